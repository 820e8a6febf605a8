//! Socket addresses as the kernel lays them out.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::BorrowedFd,
};

use crate::sys::socket::{self, End};

fn family(bytes: &[u8]) -> Option<i32> {
    let family = bytes.get(..2)?.try_into().ok()?;
    Some(i32::from(u16::from_ne_bytes(family)))
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not an address of this family")
}

/// `struct sockaddr_in` or `struct sockaddr_in6`.
pub(super) fn encode_inet(address: &SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend(v6.flowinfo().to_ne_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

/// Reads `struct sockaddr_in` or `struct sockaddr_in6`.
pub(super) fn decode_inet(bytes: &[u8]) -> io::Result<SocketAddr> {
    let part = |from: usize| -> io::Result<[u8; 4]> {
        bytes.get(from..from + 4).and_then(|part| part.try_into().ok()).ok_or_else(invalid)
    };
    let port = u16::from_be_bytes([part(0)?[2], part(0)?[3]]);
    match family(bytes) {
        Some(libc::AF_INET) => Ok(SocketAddrV4::new(Ipv4Addr::from(part(4)?), port).into()),
        Some(libc::AF_INET6) => {
            let ip: [u8; 16] =
                bytes.get(8..24).and_then(|ip| ip.try_into().ok()).ok_or_else(invalid)?;
            let flow = u32::from_ne_bytes(part(4)?);
            let scope = u32::from_ne_bytes(part(24)?);
            Ok(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into())
        }
        _ => Err(invalid()),
    }
}

/// The local address of an inet socket; none when it is not bound to anything.
pub(super) fn local(fd: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    let address = decode_inet(&socket::address(fd, End::Local)?)?;
    Ok((address.port() != 0 || !address.ip().is_unspecified()).then_some(address))
}

/// The remote address of an inet socket, when it is connected.
pub(super) fn remote(fd: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    match socket::address(fd, End::Remote) {
        Ok(bytes) => decode_inet(&bytes).map(Some),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `struct sockaddr_un` for a name: a path without its final NUL, or an abstract name.
pub(super) fn encode_unix(name: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend(name);
    // A path of full length has no room for the NUL, and needs none.
    if name.first() != Some(&0) && name.len() < 108 {
        bytes.push(0);
    }
    bytes
}

/// The name in a `struct sockaddr_un`, when there is one.
pub(super) fn decode_unix(bytes: &[u8]) -> Option<Vec<u8>> {
    let name = bytes.get(2..).filter(|name| !name.is_empty())?;
    if name[0] == 0 {
        return Some(name.to_vec());
    }
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    Some(name[..end].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inet_addresses_survive_the_round_trip() {
        for text in ["10.77.1.2:6379", "[fe80::1%3]:22", "[::]:80"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(decode_inet(&encode_inet(&address)).unwrap(), address);
        }
        assert!(decode_inet(&[2, 0, 1]).is_err());
    }

    #[test]
    fn unix_names_survive_the_round_trip() {
        for name in [&b"/run/a.sock"[..], b"\0abstract\0with zeros\0", b"relative"] {
            assert_eq!(decode_unix(&encode_unix(name)).as_deref(), Some(name));
        }
        assert_eq!(decode_unix(&encode_unix(b"")[..2]), None);
    }
}
