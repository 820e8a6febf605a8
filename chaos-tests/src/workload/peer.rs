//! The companion on another host: it answers datagrams, and for each TCP connection does what the
//! first byte asks for.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::outcome::{Failure, ensure};
use super::stream::Stream;
use super::supervisor::blocked_signals;
use crate::client::record::mix;

/// Both sides send and check all the time.
pub const STEADY: u8 = b's';
/// Both sides let the data pile up, then read it all.
pub const LAZY: u8 = b'l';
/// The companion connects back to the port that follows (two bytes, little-endian).
pub const BACK: u8 = b'b';

/// The companion reads slowly what follows the port up to the end, then connects back there and
/// tells how many bytes it were.
pub const PARCEL: u8 = b'p';

/// Seeds of the two directions.
pub const FROM_VE: u64 = 21;
/// The other direction.
pub const FROM_PEER: u64 = 22;

/// How long data piles up on a lazy connection.
pub const PILE_UP: Duration = Duration::from_millis(1500);

/// Serves until SIGTERM or SIGINT. False when something was wrong meanwhile.
pub fn serve(address: SocketAddr) -> io::Result<bool> {
    let signals = blocked_signals()?;
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let datagrams = UdpSocket::bind(address)?;
    println!("listening on {address}");
    io::stdout().flush()?;
    let failures = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || answer_datagrams(&datagrams));
    let counted = Arc::clone(&failures);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let failures = Arc::clone(&counted);
            std::thread::spawn(move || {
                if let Err(failure) = attend(stream) {
                    failures.fetch_add(1, Ordering::SeqCst);
                    eprintln!("peer: {failure}");
                }
            });
        }
    });
    poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    Ok(failures.load(Ordering::SeqCst) == 0)
}

fn answer_datagrams(socket: &UdpSocket) {
    let mut bytes = [0; 8];
    loop {
        if let Ok((8, sender)) = socket.recv_from(&mut bytes) {
            let number = u64::from_le_bytes(bytes);
            // A lost answer is noticed by the one that asked.
            if let Err(error) = socket.send_to(&mix(number).to_le_bytes(), sender) {
                eprintln!("peer: cannot answer question {number} of {sender}: {error}");
            }
        }
    }
}

fn attend(mut stream: TcpStream) -> Result<(), Failure> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind[0] {
        STEADY => Talk::new(stream, FROM_PEER, FROM_VE).run_steady(|| Ok(true)),
        LAZY => Talk::new(stream, FROM_PEER, FROM_VE).run_lazy(|| Ok(true)),
        BACK => {
            let back = TcpStream::connect(named(&mut stream)?)?;
            Talk::new(back, FROM_PEER, FROM_VE).run_steady(|| Ok(true))
        }
        PARCEL => {
            let sender = named(&mut stream)?;
            let mut content = Stream::new(FROM_VE);
            let read = slowly(&mut stream, &mut content);
            match TcpStream::connect(sender) {
                Ok(mut back) => back.write_all(&content.place().to_le_bytes())?,
                // The workload was told to stop meanwhile.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            read
        }
        other => Err(Failure::new(format!("a client asks for {other}"))),
    }
}

fn slowly(stream: &mut TcpStream, content: &mut Stream) -> Result<(), Failure> {
    let mut bytes = vec![0; 8 << 10];
    loop {
        std::thread::sleep(Duration::from_millis(5));
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => content.check(&bytes[..count])?,
        }
    }
}

/// The address of the other end with the port that it sends.
fn named(stream: &mut TcpStream) -> io::Result<SocketAddr> {
    let mut port = [0; 2];
    stream.read_exact(&mut port)?;
    let mut address = stream.peer_addr()?;
    address.set_port(u16::from_le_bytes(port));
    Ok(address)
}

/// One end of a connection on which both ends send patterned bytes.
#[derive(Debug)]
pub struct Talk {
    stream: TcpStream,
    out: Stream,
    back: Stream,
    is_peer: bool,
}

/// The longest silence of the other end that is no failure.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(15);

impl Talk {
    /// An end that sends the stream of one seed and expects that of another.
    pub fn new(stream: TcpStream, sends: u64, expects: u64) -> Self {
        let is_peer = sends == FROM_PEER;
        Self { stream, out: Stream::new(sends), back: Stream::new(expects), is_peer }
    }

    /// Sends a little and reads what there is, until `go_on` says no or the other end closes.
    pub fn run_steady(
        mut self,
        go_on: impl FnMut() -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut go_on = go_on;
        self.stream.set_nonblocking(true)?;
        let mut heard = Instant::now();
        while go_on()? {
            self.put(1 + (self.out.place() % 3000) as usize)?;
            std::thread::sleep(Duration::from_millis(5));
            match self.take()? {
                Taken::End => return Ok(()),
                Taken::Some => heard = Instant::now(),
                Taken::Nothing => {
                    let silence = heard.elapsed();
                    ensure(silence < SILENCE_MAX, || format!("nothing came for {silence:?}"))?;
                }
            }
        }
        Ok(())
    }

    /// Fills what the connection takes, lets it lie, then reads it all.
    pub fn run_lazy(mut self, go_on: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
        let mut go_on = go_on;
        self.stream.set_nonblocking(true)?;
        let mut heard = Instant::now();
        while go_on()? {
            // A bounded amount: what the buffers of both ends do not take stays for the next turn.
            for _ in 0..32 {
                self.put(16 << 10)?;
            }
            let until = Instant::now() + PILE_UP;
            while Instant::now() < until {
                if !go_on()? {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            loop {
                match self.take()? {
                    Taken::End => return Ok(()),
                    Taken::Some => heard = Instant::now(),
                    Taken::Nothing => break,
                }
            }
            let silence = heard.elapsed();
            ensure(silence < SILENCE_MAX, || format!("nothing came for {silence:?}"))?;
        }
        Ok(())
    }

    /// Sends as much of this as the connection takes now.
    fn put(&mut self, count: usize) -> Result<(), Failure> {
        match self.stream.write(&self.out.next(count)) {
            Ok(sent) => {
                self.out.advance(sent);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            // The other end has closed in good order; reading will tell.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            Err(error) if self.is_peer && error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn take(&mut self) -> Result<Taken, Failure> {
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(Taken::End),
            Ok(count) => {
                self.back.check(&bytes[..count])?;
                Ok(Taken::Some)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Taken::Nothing),
            // A workload that is told to stop closes with data unread. If it was the peer that
            // broke the connection, the workload notices.
            Err(error) if self.is_peer && error.kind() == ErrorKind::ConnectionReset => {
                Ok(Taken::End)
            }
            Err(error) => Err(error.into()),
        }
    }
}

enum Taken {
    Nothing,
    Some,
    End,
}
