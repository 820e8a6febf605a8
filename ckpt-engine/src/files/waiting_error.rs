//! Errors that wait in a socket until its program asks or the next call meets them: a reset by the
//! peer, a port where nobody listens.
//!
//! The kernel forgets an error as soon as it has told it. So a socket is not asked for it, but looked
//! at where the kernel keeps it. On the target the error is made to happen again: see each protocol.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{address, options, packet};
use crate::{
    btf::Types,
    eye::Eye,
    sys::{
        descriptor,
        socket::{self, Along},
    },
};

/// What a socket says about itself without being asked to tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// The number of the error; 0 for none.
    pub(super) error: i32,
    /// Something can be read.
    pub(super) readable: bool,
}

/// Looks at a socket, and leaves the error in it.
pub(super) fn waiting(fd: BorrowedFd<'_>) -> io::Result<Waiting> {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    let events = polled[0].revents().unwrap_or(PollFlags::empty());
    let readable = events.contains(PollFlags::POLLIN);
    if !events.contains(PollFlags::POLLERR) {
        return Ok(Waiting { error: 0, readable });
    }
    // Where the kernel's records cannot be read it is taken, which a move may do.
    let error = look(fd).or_else(|_| options::number(fd, libc::SOL_SOCKET, libc::SO_ERROR))?;
    Ok(Waiting { error, readable })
}

/// What looks at the sockets of this process, and where the error is in one.
struct Reader {
    eye: Mutex<Eye>,
    place: u32,
}

/// The error as the kernel keeps it, of a socket that is open here.
fn look(fd: BorrowedFd<'_>) -> io::Result<i32> {
    static READER: OnceLock<Option<Reader>> = OnceLock::new();
    let find = || {
        let place = Types::read().and_then(|types| types.offset("sock", "sk_err")).ok()?;
        let eye = Mutex::new(Eye::on(std::process::id().cast_signed()).ok()?);
        Some(Reader { eye, place })
    };
    let reader = READER.get_or_init(find).as_ref().ok_or(io::ErrorKind::Unsupported)?;
    let eye = reader.eye.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = eye.socket(fd.as_raw_fd(), descriptor::status(fd)?.inode)?;
    Ok(eye.word(socket, reader.place)?.cast_signed())
}

/// Gives a socket for datagrams with these addresses an error, in the network of the calling thread:
/// as a router or the receiver would tell it (ICMP).
pub(super) fn tell(
    local: SocketAddr,
    remote: Option<SocketAddr>,
    protocol: u8,
    error: i32,
) -> io::Result<()> {
    let own = packet::on_the_wire(local.ip());
    let other = match remote.map(|remote| packet::on_the_wire(remote.ip())) {
        Some(other) => other,
        None if own.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        None => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let own = match (own, other) {
        (own, IpAddr::V4(_)) if own.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        (own, IpAddr::V6(_)) if own.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        (own, _) => own,
    };
    let Some((kind, code)) = code(error, own.is_ipv4()) else {
        tracing::warn!(error, "an error that waited in a socket is lost");
        return Ok(());
    };
    // The head of what the socket seems to have sent.
    let mut sent = local.port().to_be_bytes().to_vec();
    sent.extend(remote.map_or(0, |remote| remote.port()).to_be_bytes());
    sent.extend(8u16.to_be_bytes());
    sent.extend([0; 2]);
    let mut told = vec![kind, code, 0, 0, 0, 0, 0, 0];
    told.extend(packet::build(own, other, protocol, 6, sent));
    let number = if own.is_ipv4() { packet::ICMP } else { packet::ICMP6 };
    let told = packet::build(other, own, number, 2, told);
    let raw = packet::raw_socket(own)?;
    let receiver = address::encode_inet(&(own, 0).into());
    let along = Along { receiver: &receiver, ..Along::default() };
    socket::send(raw.as_fd(), &told, &along, libc::MSG_DONTWAIT).map(drop)
}

/// Type and code of the message that is this error to whoever gets it: one that counts for every
/// connected socket, where there is one.
fn code(error: i32, v4: bool) -> Option<(u8, u8)> {
    const UNREACHABLE: u8 = 3;
    const UNREACHABLE6: u8 = 1;
    Some(match (error, v4) {
        (libc::ECONNREFUSED, true) => (UNREACHABLE, 3),
        (libc::ENOPROTOOPT, true) => (UNREACHABLE, 2),
        (libc::EOPNOTSUPP, true) => (UNREACHABLE, 5),
        (libc::EHOSTDOWN, true) => (UNREACHABLE, 7),
        (libc::ENONET, true) => (UNREACHABLE, 8),
        (libc::ENETUNREACH, true) => (UNREACHABLE, 9),
        (libc::EHOSTUNREACH, true) => (UNREACHABLE, 10),
        (libc::ENETUNREACH, false) => (UNREACHABLE6, 0),
        (libc::EACCES, false) => (UNREACHABLE6, 1),
        (libc::EHOSTUNREACH, false) => (UNREACHABLE6, 3),
        (libc::ECONNREFUSED, false) => (UNREACHABLE6, 4),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream, UdpSocket},
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use super::*;
    use crate::files::testing::{Child, new_network, rebuild};

    /// A connection that its peer has broken off.
    fn reset() -> OwnedFd {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"x").unwrap();
        (&socket).write_all(b"not read by the peer").unwrap();
        drop(peer);
        socket.into()
    }

    fn reset_unix() -> OwnedFd {
        let (mut socket, mut peer) = UnixStream::pair().unwrap();
        socket.write_all(b"not read by the peer").unwrap();
        peer.write_all(b"x").unwrap();
        socket.into()
    }

    #[test]
    fn errors_stay_in_vain_and_move() {
        new_network();
        let here = Ipv4Addr::LOCALHOST.into();
        let sockets: [OwnedFd; 4] =
            [refused(here, 0).into(), refused(here, 2).into(), reset(), reset_unix()];
        let all = [0, 1, 2, 3].map(|place: usize| sockets[place].as_fd());
        let errors = |sockets: [BorrowedFd<'_>; 4]| {
            sockets.map(|fd| options::number(fd, libc::SOL_SOCKET, libc::SO_ERROR).unwrap())
        };
        let expected = [libc::ECONNREFUSED, libc::ECONNREFUSED, libc::ECONNRESET, libc::ECONNRESET];
        let child = Child::holding(&all);
        drop(child.capture());
        let mut captured = child.capture();
        std::mem::take(&mut captured.undo).seal();
        new_network();
        let copy = rebuild(&captured);
        let numbers = all.map(|fd| fd.as_raw_fd());
        let copies = numbers.map(|number| copy.of(number));
        assert_eq!(errors([0, 1, 2, 3].map(|place| copies[place].as_fd())), expected);
        // That of the datagrams was taken by the capture that came to its end.
        let [empty, _, stream, unix] = errors(all);
        assert_eq!([empty, stream, unix], [expected[0], expected[2], expected[3]]);
    }

    #[test]
    fn an_error_before_datagrams_is_put_back() {
        new_network();
        let socket = refused(Ipv4Addr::LOCALHOST.into(), 2);
        let child = Child::holding(&[socket.as_fd()]);
        drop(child.capture());
        let expected = Waiting { error: libc::ECONNREFUSED, readable: true };
        assert_eq!(waiting(socket.as_fd()).unwrap(), expected);
    }

    /// A socket that was told that nobody listens, with so many datagrams to be read.
    fn refused(here: IpAddr, unread: usize) -> UdpSocket {
        let socket = UdpSocket::bind((here, 0)).unwrap();
        let gone = UdpSocket::bind((here, 0)).unwrap();
        socket.connect(gone.local_addr().unwrap()).unwrap();
        for _ in 0..unread {
            gone.send_to(b"x", socket.local_addr().unwrap()).unwrap();
        }
        drop(gone);
        socket.send(b"?").unwrap();
        socket
    }

    #[test]
    fn an_error_is_seen_and_stays() {
        for unread in [0, 2] {
            let socket = refused(Ipv4Addr::LOCALHOST.into(), unread);
            let expected = Waiting { error: libc::ECONNREFUSED, readable: unread > 0 };
            for _ in 0..2 {
                assert_eq!(waiting(socket.as_fd()).unwrap(), expected);
            }
            let taken = socket.take_error().unwrap().and_then(|error| error.raw_os_error());
            assert_eq!(taken, Some(libc::ECONNREFUSED));
            assert_eq!(waiting(socket.as_fd()).unwrap().error, 0);
        }
    }

    #[test]
    fn errors_are_told_again() {
        let v4 = [libc::ECONNREFUSED, libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EHOSTDOWN];
        let v6 = [libc::ECONNREFUSED, libc::EACCES];
        let here: [(IpAddr, &[i32]); 2] =
            [(Ipv4Addr::LOCALHOST.into(), &v4), (Ipv6Addr::LOCALHOST.into(), &v6)];
        for (here, errors) in here {
            let other = UdpSocket::bind((here, 0)).unwrap();
            let socket = UdpSocket::bind((here, 0)).unwrap();
            socket.connect(other.local_addr().unwrap()).unwrap();
            let names = (socket.local_addr().unwrap(), other.local_addr().ok());
            for &error in errors {
                tell(names.0, names.1, packet::UDP, error).unwrap();
                assert_eq!(waiting(socket.as_fd()).unwrap().error, error, "{here}");
                drop(socket.take_error().unwrap());
            }
        }
    }
}
