//! TCP segments that are signed (`TCP_MD5SIG`, as routers do).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ckpt_engine::sys::socket;

use super::plain::{encode, fresh, readable};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, same};

const PAUSE: Duration = Duration::from_millis(5);
/// How long it takes to be sure that nobody comes.
const SILENCE: Duration = Duration::from_millis(3);
const HERE: &str = "::ffff:127.0.0.1";

/// Sets the key for peers, all of those whose addresses begin with so many bits.
fn sign(fd: BorrowedFd<'_>, peer: SocketAddr, bits: u8, key: &[u8]) -> Result<(), Failure> {
    const TCP_MD5SIG_EXT: i32 = 32;
    const PREFIX: u8 = 1;
    let mut value = encode(peer);
    value.resize(128, 0);
    value.extend([PREFIX, bits]);
    value.extend((key.len() as u16).to_ne_bytes());
    value.extend([0; 4]);
    value.extend(key);
    value.resize(216, 0);
    Ok(socket::set_option(fd, libc::IPPROTO_TCP, TCP_MD5SIG_EXT, &value)?)
}

/// Connects with a key; a listener without it answers nothing.
fn connect(name: SocketAddr, key: &[u8]) -> Result<TcpStream, Failure> {
    let client = fresh(name, libc::SOCK_STREAM, 0)?;
    sign(client.as_fd(), name, 32, key)?;
    let client = TcpStream::from(client);
    // Of connect(2), too.
    client.set_write_timeout(Some(LATE))?;
    client.set_read_timeout(Some(LATE))?;
    socket::connect(client.as_fd(), &encode(name))?;
    Ok(client)
}

fn turn(one: &mut TcpStream, two: &mut TcpStream, number: u32) -> Result<(), Failure> {
    one.write_all(&number.to_le_bytes())?;
    let mut bytes = [0; 4];
    two.read_exact(&mut bytes)?;
    same("number in signed segments", u32::from_le_bytes(bytes), number)
}

/// A listener with keys, a connection that goes on, one of which one way is closed, and clients that
/// come with the key and without it.
pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let key = b"a key of some bytes";
    let everywhere: SocketAddr = ([0u16; 8], 0).into();
    let mapped: SocketAddr = (Ipv4Addr::new(127, 0, 0, 0).to_ipv6_mapped(), 0).into();
    let listener = fresh(everywhere, libc::SOCK_STREAM, 0)?;
    sign(listener.as_fd(), mapped, 8, key)?;
    sign(
        listener.as_fd(),
        "[fe80::]:0".parse().map_err(|_| Failure::new("no address"))?,
        10,
        b"another",
    )?;
    socket::bind(listener.as_fd(), &encode(everywhere))?;
    socket::listen(listener.as_fd(), 8)?;
    let listener = TcpListener::from(listener);
    let port = listener.local_addr()?.port();
    let name = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let accept = || -> Result<TcpStream, Failure> {
        let (server, _) = listener.accept()?;
        server.set_read_timeout(Some(LATE))?;
        Ok(server)
    };
    let mut kept = connect(name, key)?;
    let mut server = accept()?;
    let mut reader = connect(name, key)?;
    reader.shutdown(Shutdown::Write)?;
    let mut writer = accept()?;
    let mut count = 0;
    while context.step(PAUSE)? {
        count += 1;
        turn(&mut kept, &mut server, count)?;
        turn(&mut server, &mut kept, count)?;
        same("behind the end of the closed way", writer.read(&mut [0])?, 0)?;
        turn(&mut writer, &mut reader, count)?;
        // Seldom, and gone before anybody could accept it: a move waits for that.
        if count % 20 == 5 {
            let stranger = fresh(name, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
            // It is under way for ever.
            let _ = socket::connect(stranger.as_fd(), &encode(name));
            same("a client without the key", readable(listener.as_fd(), SILENCE)?, false)?;
        }
        let mut client = connect(name, key)?;
        let mut accepted = accept()?;
        same("its address", accepted.peer_addr()?.ip().to_string().as_str(), HERE)?;
        turn(&mut client, &mut accepted, count)?;
        if context.progress.plant() {
            sign(listener.as_fd(), mapped, 8, b"no key of anybody")?;
        }
    }
    Ok(())
}
