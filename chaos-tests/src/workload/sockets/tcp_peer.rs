//! TCP with another host: steady streams both ways, piled-up data both ways, a connection that the
//! other host opened, and connections that are closed at once.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::plain::set;
use crate::workload::context::{Context, Progress};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::peer::{BACK, FROM_PEER, FROM_VE, LAZY, PARCEL, SILENCE_MAX, STEADY, Talk};
use crate::workload::stream::Stream;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let peer = context.peer.ok_or_else(|| Failure::new("no peer given"))?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for (kind, port) in [(STEADY, None), (LAZY, None), (BACK, Some(0))] {
        let mut stream = TcpStream::connect(peer)?;
        stream.write_all(&[kind])?;
        let talking = match port {
            None => stream.try_clone()?,
            Some(port) => {
                let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
                stream.write_all(&listener.local_addr()?.port().to_le_bytes())?;
                listener.accept()?.0
            }
        };
        let (stop, progress) = (Arc::clone(&stop), context.progress.clone());
        let talk = Talk::new(talking, FROM_VE, FROM_PEER);
        threads.push(std::thread::spawn(move || {
            // The connection that asked for one back stays open and idle.
            let _idle = stream;
            let go_on = || go_on(&stop, &progress);
            if kind == LAZY { talk.run_lazy(go_on) } else { talk.run_steady(go_on) }
        }));
    }
    while context.step(Duration::from_millis(20))? {
        if threads.iter().any(std::thread::JoinHandle::is_finished) {
            stop.store(true, Ordering::SeqCst);
            let mut result = Err(Failure::new("the peer closed a connection"));
            for thread in threads {
                let ended =
                    thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")));
                result = ended.and(result);
            }
            return result;
        }
    }
    stop.store(true, Ordering::SeqCst);
    threads.into_iter().try_for_each(|thread| {
        thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
    })
}

/// Everything is written and the connection closed: the kernel alone goes on sending, to another
/// host that reads slowly.
pub(super) fn parcels(context: &mut Context) -> Result<(), Failure> {
    const LENGTH: usize = 600_000;
    let peer = context.peer.ok_or_else(|| Failure::new("no peer given"))?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port().to_le_bytes();
    let send = |length| -> Result<Instant, Failure> {
        let stream = TcpStream::connect(peer)?;
        set(&stream, (libc::SOL_SOCKET, libc::SO_SNDBUF, 2 * LENGTH as i32))?;
        (&stream)
            .write_all(&[&[PARCEL], &port[..], &Stream::new(FROM_VE).next(length)].concat())?;
        Ok(Instant::now())
    };
    let mut sent = send(LENGTH)?;
    let mut planted = 0;
    while context.step(Duration::from_millis(10))? {
        planted += usize::from(context.progress.plant());
        match listener.accept() {
            Ok((mut told, _)) => {
                let mut count = [0; 8];
                told.set_nonblocking(false)?;
                told.read_exact(&mut count)?;
                same("bytes that came", u64::from_le_bytes(count), (LENGTH + planted) as u64)?;
                sent = send(LENGTH)?;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let silence = sent.elapsed();
                ensure(silence < SILENCE_MAX, || format!("it has not come for {silence:?}"))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn go_on(stop: &AtomicBool, progress: &Progress) -> Result<bool, Failure> {
    progress.count();
    if progress.plant() {
        return Err(Failure::new("planted: a connection is given up"));
    }
    Ok(!stop.load(Ordering::SeqCst))
}
