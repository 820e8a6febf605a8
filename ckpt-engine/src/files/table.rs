//! The tables of sockets in `/proc/net`.

use std::{fs, io, net::SocketAddr};

/// A whole table.
#[derive(Debug, Default)]
pub(super) struct Table(String);

/// One socket in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'a>(&'a str);

impl Table {
    pub(super) fn read(path: &str) -> io::Result<Self> {
        fs::read_to_string(path).map(Self)
    }

    pub(super) fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        self.0.lines().skip(1).map(Line)
    }

    /// The line of a socket.
    pub(super) fn of_inode(&self, inode: u64) -> Option<Line<'_>> {
        let inode = inode.to_string();
        self.lines().find(|line| line.word(9) == Some(inode.as_str()))
    }
}

impl<'a> Line<'a> {
    fn word(self, place: usize) -> Option<&'a str> {
        self.0.split_whitespace().nth(place)
    }

    pub(super) fn local(self) -> Option<SocketAddr> {
        address(self.word(1)?)
    }

    /// The other end, where there is one.
    pub(super) fn remote(self) -> Option<SocketAddr> {
        address(self.word(2)?).filter(|address| !address.ip().is_unspecified())
    }

    /// What was written and is not acknowledged: bytes, and an end.
    pub(super) fn outstanding(self) -> Option<u32> {
        u32::from_str_radix(self.word(4)?.split(':').next()?, 16).ok()
    }

    /// 0 for one that no process has.
    pub(super) fn inode(self) -> Option<u64> {
        self.word(9)?.parse().ok()
    }

    /// `TCP_*`.
    pub(super) fn state(self) -> Option<u8> {
        u8::from_str_radix(self.word(3)?, 16).ok()
    }
}

/// "0100007F:0CEA": words of the address in the order of the machine, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some((v4, port).into());
    }
    Some((<[u8; 16]>::try_from(bytes.as_slice()).ok()?, port).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_its_addresses_and_its_state() {
        let table = Table(
            "  sl  local_address rem_address   st ...\n   0: 0100007F:0CEA 0200007F:0016 03 \
             00000010:00000000 00:00000000 00000000     0        0 4711 1"
                .to_owned(),
        );
        let line = table.of_inode(4711).unwrap();
        assert_eq!(line.local(), Some(([127, 0, 0, 1], 3306).into()));
        assert_eq!(line.remote(), Some(([127, 0, 0, 2], 22).into()));
        assert_eq!(line.state(), Some(3));
        assert_eq!((line.outstanding(), line.inode()), (Some(16), Some(4711)));
        assert!(table.of_inode(4712).is_none());
    }
}
