//! The first bytes of a checkpoint, encoded by hand: any build can read them.

use super::{ENTRY_LEN, ImageError, MANIFEST_MAX};

/// What a checkpoint begins with. Whoever takes it for text damages it visibly.
pub const MAGIC: [u8; 8] = *b"FERRY\r\n\x1a";

/// The version that this build writes. All earlier ones are read.
pub const VERSION: u32 = 1;

/// How long the header is, in bytes.
pub const HEADER_LEN: usize = 256;

/// The places of the fields. Those up to [`WRITER`], and [`HASH`], are the same in all versions.
const VERSION_AT: usize = 8;
const LENGTH_AT: usize = 12;
const CREATED: usize = 16;
const FILE_LEN: usize = 24;
const WRITER: usize = 32;
const WRITER_LEN: usize = 64;
const TABLE_AT: usize = 96;
const TABLE_COUNT: usize = 104;
const TABLE_HASH: usize = 112;
const MANIFEST_AT: usize = 144;
const MANIFEST_LEN: usize = 152;
const MANIFEST_HASH: usize = 160;
const CHUNKS_HASH: usize = 192;
const HASH: usize = 224;

/// The header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// When the file was written, in seconds since 1970.
    pub created_s: u64,
    /// How long the whole file is, in bytes.
    pub file_len: u64,
    /// What wrote it, up to 64 bytes.
    pub writer: String,
    /// The BLAKE3 hash of all chunks as they are in the file.
    pub chunks_hash: [u8; 32],
    /// Where the table of chunks is.
    pub table_at: u64,
    /// How many chunks there are.
    pub chunks: u64,
    /// The BLAKE3 hash of the table.
    pub table_hash: [u8; 32],
    /// Where the manifest is: behind the table.
    pub manifest_at: u64,
    /// How long it is, in bytes.
    pub manifest_len: u64,
    /// The BLAKE3 hash of the manifest.
    pub manifest_hash: [u8; 32],
}

impl Header {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_le_bytes());
        put(LENGTH_AT, &(HEADER_LEN as u32).to_le_bytes());
        put(CREATED, &self.created_s.to_le_bytes());
        put(FILE_LEN, &self.file_len.to_le_bytes());
        let writer = self.writer.as_bytes();
        put(WRITER, &writer[..writer.len().min(WRITER_LEN)]);
        put(TABLE_AT, &self.table_at.to_le_bytes());
        put(TABLE_COUNT, &self.chunks.to_le_bytes());
        put(TABLE_HASH, &self.table_hash);
        put(MANIFEST_AT, &self.manifest_at.to_le_bytes());
        put(MANIFEST_LEN, &self.manifest_len.to_le_bytes());
        put(MANIFEST_HASH, &self.manifest_hash);
        put(CHUNKS_HASH, &self.chunks_hash);
        let hash = blake3::hash(&bytes[..HASH]);
        bytes[HASH..].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// From the first bytes of a file that is `file_len` bytes long.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Self, ImageError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(ImageError::Foreign);
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(ImageError::Short { found: file_len, expected: HEADER_LEN as u64 });
        };
        if blake3::hash(&bytes[..HASH]) != array(bytes, HASH) {
            return Err(ImageError::damaged("its header is not as it was written"));
        }
        let name = &bytes[WRITER..WRITER + WRITER_LEN];
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(WRITER_LEN);
        let writer = String::from_utf8_lossy(&name[..end]).into_owned();
        let version = u32::from_le_bytes(array(bytes, VERSION_AT));
        if version > VERSION {
            return Err(ImageError::Newer { version, writer });
        }
        let number = |at| u64::from_le_bytes(array(bytes, at));
        let this = Self {
            created_s: number(CREATED),
            file_len: number(FILE_LEN),
            writer,
            chunks_hash: array(bytes, CHUNKS_HASH),
            table_at: number(TABLE_AT),
            chunks: number(TABLE_COUNT),
            table_hash: array(bytes, TABLE_HASH),
            manifest_at: number(MANIFEST_AT),
            manifest_len: number(MANIFEST_LEN),
            manifest_hash: array(bytes, MANIFEST_HASH),
        };
        if file_len != this.file_len {
            return Err(ImageError::Short { found: file_len, expected: this.file_len });
        }
        let fits = version > 0
            && u32::from_le_bytes(array(bytes, LENGTH_AT)) as usize == HEADER_LEN
            && this.is_consistent();
        if fits { Ok(this) } else { Err(ImageError::damaged("its header contradicts itself")) }
    }

    /// The parts follow each other without gaps, up to the end of the file.
    fn is_consistent(&self) -> bool {
        let table = self.chunks.checked_mul(ENTRY_LEN as u64);
        self.table_at >= HEADER_LEN as u64
            && table.and_then(|table| self.table_at.checked_add(table)) == Some(self.manifest_at)
            && self.manifest_at.checked_add(self.manifest_len) == Some(self.file_len)
            && self.manifest_len <= MANIFEST_MAX
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            created_s: 1_795_000_000,
            file_len: 256 + 1000 + 2 * ENTRY_LEN as u64 + 50,
            writer: "ferry 0.1.0".into(),
            chunks_hash: [3; 32],
            table_at: 1256,
            chunks: 2,
            table_hash: [1; 32],
            manifest_at: 1256 + 2 * ENTRY_LEN as u64,
            manifest_len: 50,
            manifest_hash: [2; 32],
        }
    }

    #[test]
    fn a_header_survives_the_round_trip() {
        let header = header();
        assert_eq!(Header::decode(&header.encode(), header.file_len), Ok(header));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let header = header();
        let bytes = header.encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged, header.file_len).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Header::decode(&bytes[..length], length as u64).is_err(), "{length}");
        }
        assert!(Header::decode(&bytes, header.file_len - 1).is_err());
        assert!(Header::decode(&bytes, header.file_len + 1).is_err());
    }

    #[test]
    fn a_later_version_is_refused_with_its_writer() {
        let mut bytes = header().encode();
        bytes[VERSION_AT] = 9;
        let hash = blake3::hash(&bytes[..HASH]);
        bytes[HASH..].copy_from_slice(hash.as_bytes());
        let refused = Header::decode(&bytes, header().file_len);
        assert_eq!(refused, Err(ImageError::Newer { version: 9, writer: "ferry 0.1.0".into() }));
    }

    #[test]
    fn parts_beyond_the_file_are_refused() {
        for change in [
            |it: &mut Header| it.chunks = u64::MAX / 56,
            |it: &mut Header| it.table_at = u64::MAX,
            |it: &mut Header| it.manifest_len = u64::MAX,
            |it: &mut Header| it.table_at = 0,
        ] {
            let mut header = header();
            change(&mut header);
            assert!(Header::decode(&header.encode(), header.file_len).is_err());
        }
    }
}
