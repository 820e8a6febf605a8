//! TCP with another host: steady streams both ways, piled-up data both ways, and a connection that
//! the other host opened.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::workload::context::{Context, Progress};
use crate::workload::outcome::Failure;
use crate::workload::peer::{BACK, FROM_PEER, FROM_VE, LAZY, STEADY, Talk};

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

fn go_on(stop: &AtomicBool, progress: &Progress) -> Result<bool, Failure> {
    progress.count();
    if progress.plant() {
        return Err(Failure::new("planted: a connection is given up"));
    }
    Ok(!stop.load(Ordering::SeqCst))
}
