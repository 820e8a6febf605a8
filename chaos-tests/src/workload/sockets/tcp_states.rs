//! TCP sockets that are not simply connected.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_engine::sys::socket;

use super::plain::{encode, fresh, pair, readable, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(5);

/// One way of a connection is closed for ever, the other goes on.
pub(super) fn one_way(context: &mut Context) -> Result<(), Failure> {
    let (mut listening, mut talking) = pair("127.0.0.1:0")?;
    listening.shutdown(Shutdown::Write)?;
    let mut out = Stream::new(31);
    let mut back = out.clone();
    while context.step(PAUSE)? {
        let bytes = out.next(1 + (out.place() % 900) as usize);
        talking.write_all(&bytes)?;
        out.advance(bytes.len());
        let mut received = vec![0; bytes.len()];
        listening.read_exact(&mut received)?;
        back.check(&received)?;
        same("behind the end of the closed way", talking.read(&mut [0])?, 0)?;
        let refused = listening.write(b"x").map_err(|error| error.kind());
        same("writing where the way is closed", refused, Err(ErrorKind::BrokenPipe))?;
        if context.progress.plant() {
            talking.write_all(b"?")?;
        }
    }
    Ok(())
}

/// Closed by the writer while the reader has hardly begun.
pub(super) fn last_words(context: &mut Context) -> Result<(), Failure> {
    hear_out(context, Some)
}

/// The same by a writer that does not wait: its socket is nobody's any more.
pub(super) fn orphan(context: &mut Context) -> Result<(), Failure> {
    hear_out(context, |_| None)
}

/// Reads slowly what was written at once. `keep` says what is kept of the writer.
fn hear_out(
    context: &mut Context,
    keep: fn(TcpStream) -> Option<TcpStream>,
) -> Result<(), Failure> {
    const LENGTH: usize = 120_000;
    let make = || -> Result<(Option<TcpStream>, TcpStream), Failure> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        set(&listener, (libc::SOL_SOCKET, libc::SO_RCVBUF, 4096))?;
        let mut writer = TcpStream::connect(listener.local_addr()?)?;
        set(&writer, (libc::SOL_SOCKET, libc::SO_SNDBUF, 2 * LENGTH as i32))?;
        let reader = listener.accept()?.0;
        writer.write_all(&Stream::new(32).next(LENGTH))?;
        writer.shutdown(Shutdown::Write)?;
        reader.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok((keep(writer), reader))
    };
    let (mut _writer, mut reader) = make()?;
    let mut back = Stream::new(32);
    while context.step(PAUSE)? {
        let mut bytes = [0; 700];
        let count = reader.read(&mut bytes)?;
        back.check(&bytes[..count])?;
        if count == 0 {
            same("bytes before the end", back.place(), LENGTH as u64)?;
            (_writer, reader) = make()?;
            back = Stream::new(32);
        }
        if context.progress.plant() {
            reader.read_exact(&mut [0])?;
        }
    }
    Ok(())
}

/// Closed by both ends with data unread in both.
pub(super) fn both_closed(context: &mut Context) -> Result<(), Failure> {
    const LENGTH: usize = 4000;
    let make = || -> Result<[TcpStream; 2], Failure> {
        let (mut one, mut two) = pair("127.0.0.1:0")?;
        for end in [&mut one, &mut two] {
            end.write_all(&Stream::new(33).next(LENGTH))?;
        }
        for end in [&one, &two] {
            end.shutdown(Shutdown::Write)?;
        }
        Ok([one, two])
    };
    let mut ends = make()?;
    let mut back = [Stream::new(33), Stream::new(33)];
    while context.step(PAUSE)? {
        for (end, back) in ends.iter_mut().zip(&mut back) {
            let mut bytes = [0; 50];
            let count = end.read(&mut bytes)?;
            back.check(&bytes[..count])?;
            if count == 0 {
                same("bytes before the end", back.place(), LENGTH as u64)?;
            }
        }
        if back.iter().all(|back| back.place() == LENGTH as u64) {
            ends = make()?;
            back = [Stream::new(33), Stream::new(33)];
        }
        if context.progress.plant() {
            ends[0].read_exact(&mut [0])?;
        }
    }
    Ok(())
}

/// Both ends are closed and all is read; the sockets are kept.
pub(super) fn finished(context: &mut Context) -> Result<(), Failure> {
    let (mut one, mut two) = pair("127.0.0.1:0")?;
    one.shutdown(Shutdown::Write)?;
    two.shutdown(Shutdown::Write)?;
    while context.step(PAUSE)? {
        for end in [&mut one, &mut two] {
            same("bytes of a finished connection", end.read(&mut [0; 10])?, 0)?;
            let refused = end.write(b"x").map_err(|error| error.kind());
            same("writing to a finished connection", refused, Err(ErrorKind::BrokenPipe))?;
        }
        if context.progress.plant() {
            one = pair("127.0.0.1:0")?.0;
            one.set_nonblocking(true)?;
        }
    }
    Ok(())
}

/// A connection that is being set up for a long time: the listener's queue is full.
pub(super) fn connecting(context: &mut Context) -> Result<(), Failure> {
    let name: SocketAddr = ([127, 0, 0, 1], 0).into();
    let full = fresh(name, libc::SOCK_STREAM, 0)?;
    socket::bind(full.as_fd(), &encode(name))?;
    socket::listen(full.as_fd(), 0)?;
    let listener = TcpListener::from(full);
    let name = listener.local_addr()?;
    let mut turn = 0u32;
    let _first = TcpStream::connect(name)?;
    let mut client = begin(name)?;
    while context.step(Duration::from_millis(20))? {
        turn += 1;
        let mut byte = [0];
        let state = client.read(&mut byte).map_err(|error| error.kind());
        let expected =
            if context.progress.plant() { ErrorKind::NotFound } else { ErrorKind::WouldBlock };
        same("reading before there is a connection", state, Err(expected))?;
        if turn.is_multiple_of(100) {
            listener.accept()?;
            // The client asks again after 1, 2, 4 seconds.
            listener.set_nonblocking(false)?;
            let mut waiting = Duration::ZERO;
            while !readable(listener.as_fd(), Duration::from_millis(100))? {
                waiting += Duration::from_millis(100);
                ensure(waiting < Duration::from_secs(40), || "no connection came".to_owned())?;
                if !context.step(Duration::ZERO)? {
                    return Ok(());
                }
            }
            let (mut server, _) = listener.accept()?;
            server.write_all(b"welcome")?;
            client.set_nonblocking(false)?;
            let mut text = [0; 7];
            client.read_exact(&mut text)?;
            same("the first words", &text, b"welcome")?;
            let _fills = TcpStream::connect(name)?;
            client = begin(name)?;
            std::mem::forget(_fills);
        }
    }
    Ok(())
}

fn begin(name: SocketAddr) -> Result<TcpStream, Failure> {
    let client = fresh(name, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match socket::connect(client.as_fd(), &encode(name)) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(client.into()),
        Err(error) => Err(error.into()),
        Ok(()) => Err(Failure::new("connected to a full listener")),
    }
}

/// A socket that only has a name: nobody else can have it.
pub(super) fn bound(context: &mut Context) -> Result<(), Failure> {
    let name: SocketAddr = ([127, 0, 0, 1], 0).into();
    let holder = fresh(name, libc::SOCK_STREAM, 0)?;
    socket::bind(holder.as_fd(), &encode(name))?;
    let mut holder = TcpStream::from(holder);
    let name = holder.local_addr()?;
    while context.step(PAUSE)? {
        same("its own name", holder.local_addr()?, name)?;
        let taken = TcpListener::bind(name).map_err(|error| error.kind());
        ensure(matches!(taken, Err(ErrorKind::AddrInUse)), || format!("{taken:?}"))?;
        if context.progress.plant() {
            holder = pair("127.0.0.1:0")?.0;
        }
    }
    Ok(())
}
