//! Connections that wait to be accepted, in numbers and of all kinds.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_engine::sys::socket;

use super::plain::{encode, fresh, readable, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(10);

/// A client that has said how it is numbered.
fn arrive(name: SocketAddr, number: u64, length: usize) -> Result<TcpStream, Failure> {
    let mut client = TcpStream::connect(name)?;
    client.write_all(&number.to_le_bytes())?;
    client.write_all(&Stream::new(number).next(length))?;
    Ok(client)
}

fn serve(
    listener: &TcpListener,
    client: &mut TcpStream,
    number: u64,
    length: usize,
) -> Result<TcpStream, Failure> {
    let (mut server, address) = listener.accept()?;
    same("who waited first", address.port(), client.local_addr()?.port())?;
    server.set_read_timeout(Some(LATE))?;
    client.set_read_timeout(Some(LATE))?;
    let mut bytes = [0; 8];
    server.read_exact(&mut bytes)?;
    same("the number of a client", u64::from_le_bytes(bytes), number)?;
    let mut rest = vec![0; length];
    server.read_exact(&mut rest)?;
    Stream::new(number).check(&rest)?;
    server.write_all(&bytes)?;
    client.read_exact(&mut bytes)?;
    same("an answer", u64::from_le_bytes(bytes), number)?;
    Ok(server)
}

fn run(
    context: &mut Context,
    listener: &TcpListener,
    names: &[SocketAddr],
    ahead: u64,
) -> Result<(), Failure> {
    let name = |number: u64| names[number as usize % names.len()];
    let length = |number: u64| (number * 37 % 3000) as usize;
    let mut waiting = Vec::new();
    for number in 0..ahead {
        waiting.push(arrive(name(number), number, length(number))?);
    }
    let mut number = 0;
    while context.step(PAUSE)? {
        let last = number + ahead;
        waiting.push(arrive(name(last), last, length(last))?);
        serve(listener, &mut waiting.remove(0), number, length(number))?;
        number += 1;
        if context.progress.plant() {
            listener.accept()?;
        }
    }
    Ok(())
}

pub(super) fn many(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    run(context, &listener, &[listener.local_addr()?], 100)
}

/// Clients of IPv6 and of IPv4 wait in one queue.
pub(super) fn six(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind("[::]:0")?;
    let port = listener.local_addr()?.port();
    let names = [SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)), ([127, 0, 0, 1], port).into()];
    run(context, &listener, &names, 6)
}

/// Clients that are gone when they are accepted: what they have said, and the end.
pub(super) fn closed(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let name = listener.local_addr()?;
    for number in 0..5 {
        drop(arrive(name, number, 500)?);
    }
    let mut number = 0u64;
    while context.step(PAUSE)? {
        drop(arrive(name, number + 5, 500)?);
        let (mut server, _) = listener.accept()?;
        server.set_read_timeout(Some(LATE))?;
        let mut bytes = [0; 8];
        server.read_exact(&mut bytes)?;
        same("the number of a client", u64::from_le_bytes(bytes), number)?;
        let mut rest = Vec::new();
        server.read_to_end(&mut rest)?;
        same("what it has said", rest.len(), 500)?;
        Stream::new(number).check(&rest)?;
        number += 1 + u64::from(context.progress.plant());
    }
    Ok(())
}

/// Two listeners with one name, each with clients of its own.
pub(super) fn group(context: &mut Context) -> Result<(), Failure> {
    let mut name: SocketAddr = ([127, 0, 0, 1], 0).into();
    let mut listeners = Vec::new();
    for _ in 0..2 {
        let listener = fresh(name, libc::SOCK_STREAM, 0)?;
        set(&listener, (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1))?;
        socket::bind(listener.as_fd(), &encode(name))?;
        socket::listen(listener.as_fd(), 200)?;
        let listener = TcpListener::from(listener);
        name = listener.local_addr()?;
        listeners.push(listener);
    }
    let mut queues = [Vec::new(), Vec::new()];
    let mut number = 0;
    let mut put = |queues: &mut [Vec<(TcpStream, u64)>; 2]| -> Result<(), Failure> {
        // All that wait are known, so the one whose queue has grown has got the new one.
        let before: Vec<u32> = listeners.iter().map(waiting).collect::<Result<_, _>>()?;
        let client = arrive(name, number, 100)?;
        let after: Vec<u32> = listeners.iter().map(waiting).collect::<Result<_, _>>()?;
        let grown = (0..2).find(|&at| after[at] > before[at]);
        let at = grown.ok_or_else(|| Failure::new("nobody has the client"))?;
        queues[at].push((client, number));
        number += 1;
        Ok(())
    };
    for _ in 0..10 {
        put(&mut queues)?;
    }
    while context.step(PAUSE)? {
        put(&mut queues)?;
        let at = usize::from(queues[1].len() > queues[0].len());
        ensure(readable(listeners[at].as_fd(), LATE)?, || "nobody waits".to_owned())?;
        let (mut client, number) = queues[at].remove(0);
        serve(&listeners[at], &mut client, number, 100)?;
        if context.progress.plant() {
            queues.iter_mut().for_each(|queue| queue.reverse());
        }
    }
    Ok(())
}

/// How many wait for a listener: `tcpi_unacked`.
fn waiting(listener: &TcpListener) -> Result<u32, Failure> {
    let mut info = [0; 32];
    socket::option(listener.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(u32::from_ne_bytes([24, 25, 26, 27].map(|at: usize| info[at])))
}
