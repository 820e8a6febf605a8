//! TCP with options, in groups, in numbers.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_engine::sys::socket;

use super::plain::{Choice, encode, fresh, keeps, number, pair, readable, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(5);
const TCP: i32 = libc::IPPROTO_TCP;
const SOL: i32 = libc::SOL_SOCKET;

fn turn(one: &mut TcpStream, two: &mut TcpStream, number: u32) -> Result<(), Failure> {
    one.write_all(&number.to_le_bytes())?;
    let mut bytes = [0; 4];
    two.read_exact(&mut bytes)?;
    same("number over TCP", u32::from_le_bytes(bytes), number)
}

fn with_options(
    context: &mut Context,
    address: &str,
    choices: &[Choice],
    damage: Choice,
) -> Result<(), Failure> {
    let (mut one, mut two) = pair(address)?;
    for choice in choices {
        set(&one, *choice)?;
    }
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        turn(&mut one, &mut two, count)?;
        turn(&mut two, &mut one, count)?;
        keeps(&one, choices)?;
        if context.progress.plant() {
            set(&one, damage)?;
        }
    }
    Ok(())
}

pub(super) fn keepalive(context: &mut Context) -> Result<(), Failure> {
    let choices = [
        (SOL, libc::SO_KEEPALIVE, 1),
        (TCP, libc::TCP_KEEPIDLE, 2),
        (TCP, libc::TCP_KEEPINTVL, 1),
        (TCP, libc::TCP_KEEPCNT, 3),
        (TCP, libc::TCP_USER_TIMEOUT, 60_000),
    ];
    with_options(context, "127.0.0.1:0", &choices, (TCP, libc::TCP_KEEPCNT, 4))
}

pub(super) fn options(context: &mut Context) -> Result<(), Failure> {
    let choices = [
        (TCP, libc::TCP_NODELAY, 1),
        (TCP, libc::TCP_LINGER2, 33),
        (TCP, 25, 100_000), // TCP_NOTSENT_LOWAT
        (TCP, libc::TCP_SYNCNT, 3),
        (SOL, libc::SO_BROADCAST, 1),
        (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
        (libc::IPPROTO_IP, 51, 0x7000_6000), // IP_LOCAL_PORT_RANGE
        (SOL, libc::SO_PRIORITY, 5),
        (SOL, libc::SO_OOBINLINE, 1),
        (SOL, libc::SO_MARK, 77),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
        (libc::IPPROTO_IP, libc::IP_MINTTL, 3),
        (libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
    ];
    with_options(context, "127.0.0.1:0", &choices, (libc::IPPROTO_IP, libc::IP_TTL, 34))
}

pub(super) fn options6(context: &mut Context) -> Result<(), Failure> {
    let choices = [
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 33),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, 2),
        (libc::IPPROTO_IPV6, 70, 0), // IPV6_AUTOFLOWLABEL
    ];
    let damage = (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 34);
    with_options(context, "[::1]:0", &choices, damage)
}

/// The congestion control is a name.
pub(super) fn congestion(context: &mut Context) -> Result<(), Failure> {
    let (mut one, mut two) = pair("127.0.0.1:0")?;
    socket::set_option(one.as_fd(), TCP, libc::TCP_CONGESTION, b"reno")?;
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        turn(&mut one, &mut two, count)?;
        let mut name = [0; 16];
        socket::option(one.as_fd(), TCP, libc::TCP_CONGESTION, &mut name)?;
        same("congestion control", &name[..5], b"reno\0")?;
        if context.progress.plant() {
            socket::set_option(one.as_fd(), TCP, libc::TCP_CONGESTION, b"cubic")?;
        }
    }
    Ok(())
}

/// Buffers of a fixed size, full in both directions.
pub(super) fn buffers(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = pair("127.0.0.1:0")?;
    let mut sizes = Vec::new();
    let mut ends = [one, two];
    for end in &ends {
        set(end, (SOL, libc::SO_SNDBUF, 30_000))?;
        set(end, (SOL, libc::SO_RCVBUF, 20_000))?;
        sizes.push([libc::SO_SNDBUF, libc::SO_RCVBUF].map(|name| number(end, SOL, name)));
        end.set_nonblocking(true)?;
    }
    let mut out = [Stream::new(41), Stream::new(42)];
    let mut back = out.clone();
    while context.step(PAUSE)? {
        for at in 0..2 {
            match ends[at].write(&out[at].next(50_000)) {
                Ok(count) => out[at].advance(count),
                Err(error) => same("a full buffer", error.kind(), ErrorKind::WouldBlock)?,
            }
            let mut bytes = [0; 3000];
            match ends[1 - at].read(&mut bytes) {
                Ok(count) => back[at].check(&bytes[..count])?,
                Err(error) => same("an empty buffer", error.kind(), ErrorKind::WouldBlock)?,
            }
            for (name, size) in [libc::SO_SNDBUF, libc::SO_RCVBUF].into_iter().zip(&sizes[at]) {
                let size = size.as_ref().map_err(Clone::clone)?;
                same("size of a buffer", number(&ends[at], SOL, name)?, *size)?;
            }
        }
        if context.progress.plant() {
            set(&ends[0], (SOL, libc::SO_RCVBUF, 30_000))?;
        }
    }
    Ok(())
}

/// `SO_RCVLOWAT`: readable from the hundredth byte on.
pub(super) fn low_water(context: &mut Context) -> Result<(), Failure> {
    let (mut one, mut two) = pair("127.0.0.1:0")?;
    set(&two, (SOL, libc::SO_RCVLOWAT, 100))?;
    one.set_nodelay(true)?;
    one.write_all(&[0; 99])?;
    while context.step(PAUSE)? {
        let early = readable(two.as_fd(), Duration::from_millis(2))?;
        same("readable at 99 of 100 bytes", early, false)?;
        one.write_all(&[1])?;
        ensure(readable(two.as_fd(), LATE)?, || "not readable at 100 bytes".to_owned())?;
        two.read_exact(&mut [0; 100])?;
        one.write_all(&[0; 99])?;
        if context.progress.plant() {
            one.write_all(&[0; 99])?;
        }
    }
    Ok(())
}

/// `SO_RCVTIMEO`: a read without data ends after a while.
pub(super) fn timeout(context: &mut Context) -> Result<(), Failure> {
    let (one, mut two) = pair("127.0.0.1:0")?;
    let patience = Duration::from_millis(40);
    two.set_read_timeout(Some(patience))?;
    two.set_write_timeout(Some(Duration::from_secs(7)))?;
    while context.step(Duration::ZERO)? {
        let start = Instant::now();
        let result = two.read(&mut [0]).map_err(|error| error.kind());
        same("a read in vain", result, Err(ErrorKind::WouldBlock))?;
        let took = start.elapsed();
        // The kernel counts in ticks of up to 10 ms.
        ensure(took + Duration::from_millis(11) > patience && took < LATE, || format!("{took:?}"))?;
        same("SO_SNDTIMEO", two.write_timeout()?, Some(Duration::from_secs(7)))?;
        if context.progress.plant() {
            (&one).write_all(b"x")?;
        }
    }
    Ok(())
}

/// A listener for IPv6 and IPv4, with clients of both.
pub(super) fn dual_stack(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind("[::]:0")?;
    let port = listener.local_addr()?.port();
    let mut pairs = Vec::new();
    for host in ["127.0.0.1", "::1"] {
        let client = TcpStream::connect((host, port))?;
        pairs.push((client, listener.accept()?.0));
    }
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        for (client, server) in &mut pairs {
            turn(client, server, count)?;
            turn(server, client, count)?;
        }
        let mapped = pairs[0].1.peer_addr()?.ip().to_string();
        same("an IPv4 client of an IPv6 socket", mapped.as_str(), "::ffff:127.0.0.1")?;
        let mut client = TcpStream::connect(("127.0.0.1", port))?;
        turn(&mut client, &mut listener.accept()?.0, count)?;
        if context.progress.plant() {
            pairs[0].1.write_all(&[0])?;
        }
    }
    Ok(())
}

/// A listener and its clients that are bound to a device.
pub(super) fn device(context: &mut Context) -> Result<(), Failure> {
    let name: SocketAddr = ([127, 0, 0, 1], 0).into();
    let listener = fresh(name, libc::SOCK_STREAM, 0)?;
    socket::set_option(listener.as_fd(), SOL, libc::SO_BINDTODEVICE, b"lo\0")?;
    socket::bind(listener.as_fd(), &encode(name))?;
    socket::listen(listener.as_fd(), 8)?;
    let listener = TcpListener::from(listener);
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut server, _) = listener.accept()?;
        turn(&mut client, &mut server, count)?;
        for socket in [listener.as_fd(), server.as_fd()] {
            let mut name = [0; 16];
            let length = socket::option(socket, SOL, libc::SO_BINDTODEVICE, &mut name)?;
            same("device of a socket", &name[..length], b"lo\0")?;
        }
        if context.progress.plant() {
            socket::set_option(listener.as_fd(), SOL, libc::SO_BINDTODEVICE, b"\0")?;
        }
    }
    Ok(())
}

fn listener(choices: &[Choice], protocol: i32) -> Result<TcpListener, Failure> {
    let name: SocketAddr = ([127, 0, 0, 1], 0).into();
    let listener = fresh(name, libc::SOCK_STREAM, protocol)?;
    choices.iter().try_for_each(|choice| set(&listener, *choice))?;
    socket::bind(listener.as_fd(), &encode(name))?;
    socket::listen(listener.as_fd(), 64)?;
    Ok(TcpListener::from(listener))
}

/// What a listener hands on to those that it accepts.
pub(super) fn listener_options(context: &mut Context) -> Result<(), Failure> {
    let choices = [
        (SOL, libc::SO_KEEPALIVE, 1),
        (TCP, libc::TCP_NODELAY, 1),
        (TCP, libc::TCP_MAXSEG, 900),
        (TCP, libc::TCP_FASTOPEN, 16),
        (TCP, libc::TCP_SAVE_SYN, 1),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
    ];
    let listener = listener(&choices, 0)?;
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        keeps(&listener, &choices)?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut server, _) = listener.accept()?;
        turn(&mut client, &mut server, count)?;
        keeps(&server, &choices[..2])?;
        let segment = number(&server, TCP, libc::TCP_MAXSEG)?;
        ensure(segment <= 900, || format!("segments of {segment} bytes"))?;
        if context.progress.plant() {
            set(&listener, (TCP, libc::TCP_NODELAY, 0))?;
        }
    }
    Ok(())
}

/// `TCP_DEFER_ACCEPT`: a client counts when it has said something.
pub(super) fn deferred(context: &mut Context) -> Result<(), Failure> {
    let listener = listener(&[(TCP, libc::TCP_DEFER_ACCEPT, 30)], 0)?;
    let rounded = number(&listener, TCP, libc::TCP_DEFER_ACCEPT)?;
    let mut turn = 0u32;
    while context.step(PAUSE)? {
        keeps(&listener, &[(TCP, libc::TCP_DEFER_ACCEPT, rounded)])?;
        turn += 1;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        // Seldom: a silent client is something that a checkpoint waits for.
        if turn % 50 == 20 {
            same("a silent client", readable(listener.as_fd(), Duration::from_millis(3))?, false)?;
        }
        client.write_all(b"hello")?;
        ensure(readable(listener.as_fd(), LATE)?, || "nobody came".to_owned())?;
        listener.accept()?.0.read_exact(&mut [0; 5])?;
        if context.progress.plant() {
            set(&listener, (TCP, libc::TCP_DEFER_ACCEPT, 0))?;
        }
    }
    Ok(())
}

/// Several listeners with one name: each client gets one of them.
pub(super) fn group(context: &mut Context) -> Result<(), Failure> {
    let first = listener(&[(SOL, libc::SO_REUSEPORT, 1)], 0)?;
    let name = first.local_addr()?;
    let mut listeners = vec![first];
    for _ in 0..3 {
        let other: OwnedFd = fresh(name, libc::SOCK_STREAM, 0)?;
        set(&other, (SOL, libc::SO_REUSEPORT, 1))?;
        socket::bind(other.as_fd(), &encode(name))?;
        socket::listen(other.as_fd(), 16)?;
        listeners.push(other.into());
    }
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        let mut client = TcpStream::connect(name)?;
        let mut accepted = None;
        for listener in &listeners {
            if readable(listener.as_fd(), Duration::ZERO)? {
                accepted = Some(listener.accept()?.0);
            }
        }
        let mut server = accepted.ok_or_else(|| Failure::new("no listener has the client"))?;
        turn(&mut client, &mut server, count)?;
        if context.progress.plant() {
            // Clients go on to choose this one, which nobody looks at.
            std::mem::forget(listeners.pop());
            std::mem::forget(listeners.pop());
            std::mem::forget(listeners.pop());
        }
    }
    Ok(())
}

/// Connections in numbers, used one after the other.
pub(super) fn many(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut pairs = Vec::new();
    for _ in 0..200 {
        let client = TcpStream::connect(listener.local_addr()?)?;
        pairs.push((client, listener.accept()?.0));
    }
    let mut count = 0;
    while context.step(Duration::from_millis(1))? {
        count += 1;
        let at = count as usize % pairs.len();
        let (client, server) = &mut pairs[at];
        turn(client, server, count)?;
        turn(server, client, count)?;
        if context.progress.plant() {
            for (client, _) in &mut pairs {
                client.write_all(&[0])?;
            }
        }
    }
    Ok(())
}

/// A listener for MPTCP, with clients that speak TCP.
pub(super) fn multipath(context: &mut Context) -> Result<(), Failure> {
    let listener = listener(&[(SOL, libc::SO_REUSEADDR, 1)], libc::IPPROTO_MPTCP)?;
    let mut protocol = libc::IPPROTO_MPTCP;
    let mut kept = TcpStream::connect(listener.local_addr()?)?;
    let mut server = listener.accept()?.0;
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        same("SO_PROTOCOL", number(&listener, SOL, libc::SO_PROTOCOL)?, protocol)?;
        turn(&mut kept, &mut server, count)?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        turn(&mut client, &mut listener.accept()?.0, count)?;
        if context.progress.plant() {
            protocol = 0;
        }
    }
    Ok(())
}

/// A thread that always writes, and mostly waits for its reader.
pub(super) fn blocked_writer(context: &mut Context) -> Result<(), Failure> {
    let (mut reader, mut writer) = pair("127.0.0.1:0")?;
    set(&writer, (SOL, libc::SO_SNDBUF, 8192))?;
    let thread = std::thread::spawn(move || {
        let mut out = Stream::new(43);
        // Ends when the reader goes.
        while writer.write_all(&out.next(5000)).is_ok() {
            out.advance(5000);
        }
    });
    reader.set_read_timeout(Some(LATE))?;
    let mut back = Stream::new(43);
    while context.step(PAUSE)? {
        let mut bytes = [0; 1500];
        let count = reader.read(&mut bytes)?;
        ensure(count > 0, || "the writer has gone".to_owned())?;
        back.check(&bytes[..count])?;
        if context.progress.plant() {
            reader.read_exact(&mut [0])?;
        }
    }
    drop(reader);
    thread.join().map_err(|_| Failure::new("the writer panicked"))
}
