//! The table of chunks.

use super::{HEADER_LEN, ImageError};

/// How long an entry is, in bytes.
pub const ENTRY_LEN: usize = 56;

/// The most bytes that a chunk holds.
pub const CHUNK_MAX: u32 = 1 << 20;

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// Pages and file data.
    Data,
    /// A piece of the record stream.
    Records,
}

/// How a chunk is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As it is.
    Plain,
    /// One zstd frame (RFC 8878).
    Zstd,
}

/// One entry of the table: all numbers little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The BLAKE3 hash of what it holds.
    pub hash: [u8; 32],
    /// Where it is in the file. The first chunk begins behind the header, each other one behind
    /// its predecessor.
    pub at: u64,
    /// How many bytes it takes there.
    pub stored: u32,
    /// How many bytes it holds.
    pub plain: u32,
    /// What it holds.
    pub kind: ChunkKind,
    /// How.
    pub coding: Coding,
}

impl Chunk {
    /// As bytes: hash, place, bytes in the file, bytes held, kind (1 data, 2 records), coding (0
    /// plain, 1 zstd), six zeros.
    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..32].copy_from_slice(&self.hash);
        bytes[32..40].copy_from_slice(&self.at.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.stored.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.plain.to_le_bytes());
        bytes[48] = match self.kind {
            ChunkKind::Data => 1,
            ChunkKind::Records => 2,
        };
        bytes[49] = match self.coding {
            Coding::Plain => 0,
            Coding::Zstd => 1,
        };
        bytes
    }

    /// From the table. What follows from the entry alone is checked.
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Result<Self, ImageError> {
        let damaged = || ImageError::damaged("an entry of the table of chunks is impossible");
        let number = |at: usize| {
            let mut out = [0; 4];
            out.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(out)
        };
        let kind = match bytes[48] {
            1 => ChunkKind::Data,
            2 => ChunkKind::Records,
            _ => return Err(damaged()),
        };
        let coding = match bytes[49] {
            0 => Coding::Plain,
            1 => Coding::Zstd,
            _ => return Err(damaged()),
        };
        let this = Self {
            hash: bytes.first_chunk().copied().ok_or_else(damaged)?,
            at: u64::from(number(32)) | u64::from(number(36)) << 32,
            stored: number(40),
            plain: number(44),
            kind,
            coding,
        };
        let whole = this.coding == Coding::Zstd || this.stored == this.plain;
        // What does not get smaller is kept plain.
        let small =
            (1..=CHUNK_MAX).contains(&this.plain) && (1..=this.plain).contains(&this.stored);
        let zeros = bytes[50..].iter().all(|&byte| byte == 0);
        let placed =
            this.at >= HEADER_LEN as u64 && this.at.checked_add(this.stored.into()).is_some();
        if whole && small && zeros && placed { Ok(this) } else { Err(damaged()) }
    }

    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.at.saturating_add(self.stored.into())
    }

    /// What a chunk holds, from what is in the file. The hash must be that of the table.
    pub fn open(&self, stored: Vec<u8>) -> Result<Vec<u8>, ImageError> {
        let damaged = || ImageError::damaged(format!("the chunk at byte {}", self.at));
        let plain = match self.coding {
            Coding::Plain => stored,
            Coding::Zstd => {
                zstd::bulk::decompress(&stored, self.plain as usize).map_err(|_| damaged())?
            }
        };
        let fits = plain.len() == self.plain as usize && blake3::hash(&plain) == self.hash;
        if fits { Ok(plain) } else { Err(damaged()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk() -> Chunk {
        Chunk {
            hash: [7; 32],
            at: 0x1_0000_0200,
            stored: 100,
            plain: 4096,
            kind: ChunkKind::Data,
            coding: Coding::Zstd,
        }
    }

    #[test]
    fn an_entry_survives_the_round_trip() {
        assert_eq!(Chunk::decode(&chunk().encode()), Ok(chunk()));
        let records = Chunk { kind: ChunkKind::Records, ..chunk() };
        assert_eq!(Chunk::decode(&records.encode()), Ok(records));
    }

    #[test]
    fn impossible_entries_are_refused() {
        for wrong in [
            Chunk { plain: CHUNK_MAX + 1, ..chunk() },
            Chunk { plain: 0, ..chunk() },
            Chunk { stored: 0, ..chunk() },
            Chunk { stored: 4097, ..chunk() },
            Chunk { at: 0, ..chunk() },
            Chunk { at: u64::MAX, ..chunk() },
            Chunk { coding: Coding::Plain, ..chunk() },
        ] {
            assert!(Chunk::decode(&wrong.encode()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn contents_are_checked() {
        let plain = vec![5; 4096];
        let packed = zstd::bulk::compress(&plain, 1).unwrap();
        let chunk = Chunk {
            hash: *blake3::hash(&plain).as_bytes(),
            stored: packed.len() as u32,
            ..chunk()
        };
        assert_eq!(chunk.open(packed.clone()), Ok(plain));
        assert!(chunk.open(packed[1..].to_vec()).is_err());
        assert!(Chunk { hash: [0; 32], ..chunk }.open(packed.clone()).is_err());
        assert!(Chunk { plain: 100, ..chunk }.open(packed.clone()).is_err());
        assert!(Chunk { plain: 5000, ..chunk }.open(packed).is_err());
    }
}
