//! Writes a checkpoint file.

use std::{
    collections::HashMap,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use ckpt_format::{
    image::{Chunk, ChunkKind, HEADER_LEN, Header, Manifest, Piece, Record, Summary, codec},
    memory::{Run, Space},
    state::State,
    stream, tree,
};

use super::{
    ImageFileError,
    draft::{Draft, failed},
    press::Press,
};

/// How hard a checkpoint is compressed when nothing is said.
pub const COMPRESSION_DEFAULT: u8 = 1;
/// The most that can be asked for.
pub const COMPRESSION_MAX: u8 = 19;

/// How many bytes go into a chunk: enough for the compression, few to read for one page.
const CHUNK: usize = 256 << 10;
/// What is kept once, however often it comes: a page, or as much of a file.
const BLOCK: usize = 4096;
/// How many blocks are remembered at least, and half of how many at most: about 20 MiB.
const REMEMBERED: usize = 256 << 10;

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// The size of the file, in bytes.
    pub bytes: u64,
    /// How much of everything it has.
    pub summary: Summary,
}

/// A checkpoint file in the making. Dropped before [`ImageWriter::finish`], there is none.
pub struct ImageWriter {
    draft: Draft,
    press: Press,
    /// How many chunks were handed to it.
    chunks: u64,
    /// The data chunk that is being filled. Its number is the next one.
    data: Vec<u8>,
    /// The record stream as far as it is not written.
    records: Vec<u8>,
    known: Known,
    summary: Summary,
    broken: bool,
}

impl std::fmt::Debug for ImageWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageWriter")
            .field("draft", &self.draft)
            .field("press", &self.press)
            .finish()
    }
}

impl ImageWriter {
    /// Begins a file at `path`. `level` is that of zstd; 0 is none.
    pub fn create(path: &Path, level: u8) -> Result<Self, ImageFileError> {
        let mut draft = Draft::begin(path)?;
        draft.file.write_all(&[0; HEADER_LEN]).map_err(failed("write", path))?;
        let press = Press::start(&draft.file, path, level.min(COMPRESSION_MAX))?;
        Ok(Self {
            draft,
            press,
            chunks: 0,
            data: Vec::with_capacity(CHUNK),
            records: Vec::with_capacity(CHUNK),
            known: Known::default(),
            summary: Summary::default(),
            broken: false,
        })
    }

    /// How long the file is so far, in bytes.
    pub fn len(&self) -> u64 {
        self.press.at()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.len() == HEADER_LEN as u64
    }

    /// A change of the processes and their memory.
    pub fn memory(&mut self, record: &stream::Record) -> Result<(), ImageFileError> {
        match record {
            stream::Record::Pages { space, runs, data } => self.pages(*space, runs.clone(), data),
            other => self.record(&Record::Memory(other.clone())),
        }
    }

    fn pages(&mut self, space: Space, runs: Vec<Run>, data: &[u8]) -> Result<(), ImageFileError> {
        self.summary.memory_bytes += data.len() as u64;
        let (pieces, zeros, repeated) = self.store(data)?;
        self.summary.zero_bytes += zeros;
        self.summary.repeated_bytes += repeated;
        self.record(&Record::Pages { space, runs, data: pieces })
    }

    /// A change of the files.
    pub fn file(&mut self, record: &tree::FileRecord) -> Result<(), ImageFileError> {
        match &record.step {
            tree::Step::Data { path, offset, data } => {
                self.summary.file_bytes += data.len() as u64;
                let (data, ..) = self.store(data)?;
                let (tree, path, offset) = (record.tree, path.clone(), *offset);
                self.record(&Record::FileData { tree, path, offset, data })
            }
            _ => self.record(&Record::File(record.clone())),
        }
    }

    /// Everything else.
    pub fn state(&mut self, state: &State) -> Result<(), ImageFileError> {
        let count = |length: usize| length as u64;
        self.summary.processes = count(state.processes.processes.len());
        self.summary.threads =
            state.processes.processes.iter().map(|process| count(process.threads.len())).sum();
        self.summary.descriptors = state.tables.values().map(|table| count(table.len())).sum();
        self.summary.open_files = count(state.files.files.len());
        self.record(&Record::State(Box::new(state.clone())))
    }

    /// Appends to the record stream.
    pub fn record(&mut self, record: &Record) -> Result<(), ImageFileError> {
        self.records.extend(codec::encode(record));
        if self.records.len() >= CHUNK { self.flush_records() } else { Ok(()) }
    }

    /// Takes contents, and says where they are. Also counts the zeros and what was known.
    fn store(&mut self, contents: &[u8]) -> Result<(Vec<Piece>, u64, u64), ImageFileError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut zeros, mut repeated) = (0, 0);
        for block in contents.chunks(BLOCK) {
            let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
            let (chunk, at) = if is_zero(block) {
                zeros += u64::from(length);
                (0, 0)
            } else {
                let hash = Known::key(block);
                match self.known.find(hash) {
                    Some(place) => {
                        repeated += u64::from(length);
                        place
                    }
                    None => {
                        let place = self.append(block)?;
                        self.known.insert(hash, place);
                        place
                    }
                }
            };
            match pieces.last_mut() {
                Some(Piece(0, 0, before)) if chunk == 0 => *before += length,
                Some(Piece(same, start, before)) if *same == chunk && *start + *before == at => {
                    *before += length;
                }
                _ => pieces.push(Piece(chunk, at, length)),
            }
        }
        Ok((pieces, zeros, repeated))
    }

    fn append(&mut self, block: &[u8]) -> Result<(u64, u32), ImageFileError> {
        if self.data.len() + block.len() > CHUNK {
            self.flush_data()?;
        }
        let at = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        self.data.extend(block);
        Ok((self.chunks + 1, at))
    }

    fn flush_data(&mut self) -> Result<(), ImageFileError> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(CHUNK));
        self.chunk(data, ChunkKind::Data)
    }

    fn flush_records(&mut self) -> Result<(), ImageFileError> {
        // What they refer to comes first.
        self.flush_data()?;
        let records = std::mem::replace(&mut self.records, Vec::with_capacity(CHUNK));
        records.chunks(CHUNK).try_for_each(|piece| self.chunk(piece.to_vec(), ChunkKind::Records))
    }

    fn chunk(&mut self, plain: Vec<u8>, kind: ChunkKind) -> Result<(), ImageFileError> {
        if self.broken {
            return Err(ImageFileError::Stopped);
        }
        self.chunks += 1;
        self.press.put(plain, kind).map_err(|source| {
            self.broken = true;
            failed("write", &self.draft.path)(source)
        })
    }

    /// Completes the file and gives it its name. `manifest` gets what the summary is.
    pub fn finish(
        mut self,
        manifest: impl FnOnce(Summary) -> Manifest,
    ) -> Result<Written, ImageFileError> {
        self.record(&Record::End)?;
        self.flush_records()?;
        let pressed = self.press.end().map_err(failed("write", &self.draft.path))?;
        let table: Vec<u8> = pressed.table.iter().flat_map(Chunk::encode).collect();
        let manifest = codec::encode(&manifest(self.summary.clone()));
        let (table_at, manifest_at) = (pressed.at, pressed.at + table.len() as u64);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let header = Header {
            created_s: created.as_secs(),
            file_len: manifest_at + manifest.len() as u64,
            writer: concat!("ferry ", env!("CARGO_PKG_VERSION")).to_owned(),
            chunks_hash: *pressed.hasher.finalize().as_bytes(),
            table_at,
            chunks: pressed.table.len() as u64,
            table_hash: *blake3::hash(&table).as_bytes(),
            manifest_at,
            manifest_len: manifest.len() as u64,
            manifest_hash: *blake3::hash(&manifest).as_bytes(),
        };
        let mut file = &self.draft.file;
        let written = file
            .write_all(&table)
            .and_then(|()| file.write_all(&manifest))
            .and_then(|()| self.draft.file.write_all_at(&header.encode(), 0));
        written.map_err(failed("write", &self.draft.path))?;
        self.draft.commit()?;
        Ok(Written { bytes: header.file_len, summary: self.summary })
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|&byte| byte == 0)
}

/// Where blocks are that came before. Of a VE of any size only so many are remembered; what comes
/// again after that is written again.
#[derive(Debug, Default)]
struct Known {
    young: HashMap<u128, (u64, u32)>,
    old: HashMap<u128, (u64, u32)>,
}

impl Known {
    /// Half of the hash is enough to tell blocks of one file apart.
    fn key(block: &[u8]) -> u128 {
        let hash = blake3::hash(block);
        let half = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        u128::from_le_bytes(half)
    }

    fn find(&mut self, key: u128) -> Option<(u64, u32)> {
        let found = self.young.get(&key).or_else(|| self.old.get(&key)).copied()?;
        self.insert(key, found);
        Some(found)
    }

    fn insert(&mut self, key: u128, place: (u64, u32)) {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, place);
    }
}
