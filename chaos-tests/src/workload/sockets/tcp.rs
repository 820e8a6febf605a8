//! TCP inside one host: unread data, half-closed connections, listeners, connections that wait.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::both_ways::BothWays;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::Child;
use crate::workload::stream::Stream;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut pairs = vec![pair(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?];
    // A host without IPv6 is none that this test is for, but a VE may be without.
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        pairs.push(pair(SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))?);
    }
    let mut half_closed = HalfClosed::new()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let echo = Child::start(context, "echo", |_| answer(&listener))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    client.set_nodelay(true)?;
    let mut turn = 0u32;
    while context.step(Duration::from_millis(4))? {
        for pair in &mut pairs {
            pair.turn()?;
            // Options are part of a connection.
            for (end, wanted) in pair.ends.iter().zip([true, false]) {
                same("TCP_NODELAY", end.nodelay()?, wanted)?;
            }
        }
        half_closed.turn()?;
        echo.check()?;
        turn += 1;
        client.write_all(&turn.to_le_bytes())?;
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes)?;
        same("answer over TCP", u32::from_le_bytes(bytes), turn)?;
        if context.progress.plant() {
            pairs[0].ends[0].read_exact(&mut [0])?;
        }
    }
    drop(client);
    echo.finish()
}

fn answer(listener: &TcpListener) -> Result<(), Failure> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut bytes = [0; 4];
    loop {
        match stream.read_exact(&mut bytes) {
            Ok(()) => stream.write_all(&bytes)?,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection with unread data at both ends, one of which does not wait for more to send.
fn pair(address: SocketAddr) -> Result<BothWays<TcpStream>, Failure> {
    let listener = TcpListener::bind(address)?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    let (two, _) = listener.accept()?;
    one.set_nodelay(true)?;
    BothWays::new([one, two], [11, 12], 15_000, 2000)
}

/// A connection closed in one direction with data before the end still unread; made anew when the
/// data is used up.
struct HalfClosed {
    closed: TcpStream,
    open: TcpStream,
    back: Stream,
    left: usize,
}

impl HalfClosed {
    fn new() -> Result<Self, Failure> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut closed = TcpStream::connect(listener.local_addr()?)?;
        let (open, _) = listener.accept()?;
        let left = 3000;
        closed.write_all(&Stream::new(13).next(left))?;
        closed.shutdown(Shutdown::Write)?;
        Ok(Self { closed, open, back: Stream::new(13), left })
    }

    fn turn(&mut self) -> Result<(), Failure> {
        self.open.write_all(b"k")?;
        let mut byte = [0];
        self.closed.read_exact(&mut byte)?;
        same("the open direction", byte, *b"k")?;
        if self.left > 0 {
            let mut bytes = [0; 10];
            self.open.read_exact(&mut bytes)?;
            self.left -= bytes.len();
            return self.back.check(&bytes);
        }
        same("after the end of a closed direction", self.open.read(&mut byte)?, 0)?;
        *self = Self::new()?;
        Ok(())
    }
}

/// Connections that nobody has accepted yet, some with data in them.
pub(super) fn backlog(context: &mut Context) -> Result<(), Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut waiting = Vec::new();
    for number in 0..3u8 {
        waiting.push(arrive(&listener, number)?);
    }
    let mut number = 3u8;
    while context.step(Duration::from_millis(400))? {
        waiting.push(arrive(&listener, number)?);
        number = number.wrapping_add(1);
        let (mut server, address) = listener.accept()?;
        let client = waiting.remove(0);
        same("who waited first", address, client.local_addr()?)?;
        drop(client);
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes)?;
        let mut expected = number.wrapping_sub(4);
        if context.progress.plant() {
            expected ^= 1;
        }
        let length = if expected.is_multiple_of(2) { 0 } else { 100 };
        same("what one wrote while waiting", bytes, vec![expected; length])?;
    }
    Ok(())
}

fn arrive(listener: &TcpListener, number: u8) -> Result<TcpStream, Failure> {
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    if number % 2 == 1 {
        client.write_all(&[number; 100])?;
    }
    Ok(client)
}
