//! The pieces in which the kernel keeps what a socket has to send (`struct sk_buff`).

use std::io;

use crate::{btf::Types, direct_map::DirectMap, look::Look};

/// More pieces than a queue of any size has that one VE may fill.
pub(super) const PIECES_MAX: usize = 1 << 16;
/// More bytes than the largest of them holds.
const BYTES_MAX: u32 = 1 << 30;

/// Where everything is in the running kernel: bytes from the beginning of a piece, or of what is
/// behind a piece (`struct skb_shared_info`).
#[derive(Clone, Copy, Debug)]
struct Places {
    piece: usize,
    next: usize,
    len: usize,
    len_elsewhere: usize,
    head: usize,
    end: usize,
    data: usize,
    transport: usize,
    shared: usize,
    parts: usize,
    others: usize,
    part: usize,
}

/// Reads them.
#[derive(Debug)]
pub(super) struct Pieces {
    pub(super) look: Look,
    memory: DirectMap,
    places: Places,
}

impl Pieces {
    pub(super) fn find(types: &Types) -> io::Result<Self> {
        let at = |structure: &str, member: &str| {
            types.offset(structure, member).map(|offset| offset as usize)
        };
        let places = Places {
            piece: types.size("sk_buff")? as usize,
            next: at("sk_buff", "next")?,
            len: at("sk_buff", "len")?,
            len_elsewhere: at("sk_buff", "data_len")?,
            head: at("sk_buff", "head")?,
            end: at("sk_buff", "end")?,
            data: at("sk_buff", "data")?,
            transport: at("sk_buff", "transport_header")?,
            shared: types.size("skb_shared_info")? as usize,
            parts: at("skb_shared_info", "nr_frags")?,
            others: at("skb_shared_info", "frag_list")?,
            part: at("skb_shared_info", "frags")?,
        };
        let look = Look::new(types.function("bpf_iter_task")?)?;
        let memory = DirectMap::find(types, &look)?;
        Ok(Self { look, memory, places })
    }

    /// How many bytes of a piece are looked at.
    pub(super) fn piece_len(&self) -> usize {
        self.places.piece
    }

    /// All of a ring, whose beginning is in the socket.
    pub(super) fn ring(&self, head: u64, first: u64) -> io::Result<Vec<Vec<u8>>> {
        let (mut all, mut next) = (Vec::new(), first);
        while next != head && next != 0 && all.len() < PIECES_MAX {
            let piece = self.look.at(&[(next, self.places.piece)])?.swap_remove(0);
            next = number(&piece, self.places.next);
            all.push(piece);
        }
        Ok(all)
    }

    /// What is in a piece: some bytes beside it, and parts of pages.
    pub(super) fn bytes(&self, piece: &[u8]) -> io::Result<Vec<u8>> {
        const PART: usize = 16;
        let at = &self.places;
        let [len, elsewhere] = [at.len, at.len_elsewhere].map(|place| word(piece, place));
        let own = len.checked_sub(elsewhere).ok_or(io::ErrorKind::InvalidData)?;
        if len > BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut wanted = vec![(number(piece, at.data), own as usize)];
        if elsewhere > 0 {
            let behind = number(piece, at.head).wrapping_add(word(piece, at.end).into());
            let shared = &self.look.at(&[(behind, at.shared)])?[0];
            let count = usize::from(shared[at.parts]);
            let parts = shared.get(at.part..at.part + count * PART);
            let parts = parts.filter(|_| number(shared, at.others) == 0);
            for part in parts.ok_or(io::ErrorKind::Unsupported)?.chunks_exact(PART) {
                let page =
                    self.memory.address(number(part, 0)).ok_or(io::ErrorKind::Unsupported)?;
                let [len, offset] = [word(part, 8), word(part, 12)];
                if len > BYTES_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                wanted.push((page.wrapping_add(offset.into()), len as usize));
            }
        }
        let bytes = self.look.at(&wanted)?.concat();
        if bytes.len() == len as usize { Ok(bytes) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// How many of its bytes come before the header of the transport protocol.
    pub(super) fn before_transport(&self, piece: &[u8]) -> u64 {
        let transport = u64::from(short(piece, self.places.transport));
        let data = number(piece, self.places.data);
        number(piece, self.places.head).wrapping_add(transport).wrapping_sub(data)
    }
}

pub(super) fn number(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(number)
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

pub(super) fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}
