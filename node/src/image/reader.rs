//! Reads a checkpoint file.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
};

use ckpt_format::image::{
    CHUNK_MAX, Chunk, ChunkKind, ENTRY_LEN, HEADER_LEN, Header, ImageError, Manifest, Piece,
    Record, codec,
};

use super::{ImageFileError, draft::failed};

/// How many opened chunks are kept: what is wanted again is often near.
const CACHED: usize = 64;
/// How many chunks are read before they are opened.
const AHEAD: usize = 4;

/// A checkpoint file that was opened. Header and manifest are as they were written; of the rest
/// only [`Image::verify`] can say so.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    header: Header,
    manifest: Manifest,
}

impl Image {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, ImageFileError> {
        let file = File::open(path).map_err(failed("open", path))?;
        let metadata = file.metadata().map_err(failed("look at", path))?;
        if !metadata.is_file() {
            return Err(ImageFileError::Path { path: path.to_owned() });
        }
        let refuse = |source| ImageFileError::Contents { path: path.to_owned(), source };
        let mut start = Vec::new();
        let mut head = (&file).take(HEADER_LEN as u64);
        head.read_to_end(&mut start).map_err(failed("read", path))?;
        let header = Header::decode(&start, metadata.len()).map_err(refuse)?;
        // The header is true to itself, so this is not longer than the file, nor than its limit.
        let mut manifest = vec![0; usize::try_from(header.manifest_len).unwrap_or(0)];
        file.read_exact_at(&mut manifest, header.manifest_at).map_err(failed("read", path))?;
        if blake3::hash(&manifest) != header.manifest_hash {
            return Err(refuse(ImageError::damaged("its manifest is not as it was written")));
        }
        let manifest = codec::decode("the manifest", &manifest).map_err(refuse)?;
        Ok(Self { file, path: path.to_owned(), header, manifest })
    }

    /// What wrote it, when, and how long it is.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the VE is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all of it: every chunk is what its hash says, every record can be understood, and
    /// what it refers to is there. `visit` sees each record, and may refuse it.
    pub fn verify(
        &self,
        progress: &mut dyn FnMut(u64, u64),
        visit: &mut dyn FnMut(&Record) -> Result<(), ImageError>,
    ) -> Result<(), ImageFileError> {
        self.verify_chunks(progress)?;
        let mut records = self.records();
        let (mut states, mut entry) = (0u32, None);
        while let Some(record) = records.next()? {
            match &record {
                Record::State(_) => states += 1,
                Record::Pages { data, .. } | Record::FileData { data, .. } => {
                    self.verify_pieces(data, &mut entry)?;
                }
                _ => {}
            }
            visit(&record).map_err(|source| self.refuse(source))?;
        }
        if states == 1 { Ok(()) } else { Err(self.damaged("it has no state, or several")) }
    }

    /// Reads them on this thread, and opens them on another one.
    fn verify_chunks(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ImageFileError> {
        std::thread::scope(|scope| {
            let (queue, read) = sync_channel::<(Chunk, Vec<u8>)>(AHEAD);
            let opening = scope
                .spawn(move || read.iter().try_for_each(|(chunk, it)| chunk.open(it).map(drop)));
            let hashes = self.read_chunks(progress, queue);
            // Of an earlier chunk, if it has found something.
            let opened = opening.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            opened.map_err(|source| self.refuse(source))?;
            let (table, chunks) = hashes?;
            if table != self.header.table_hash {
                return Err(self.damaged("its table of chunks is not as it was written"));
            }
            match chunks == self.header.chunks_hash {
                true => Ok(()),
                false => Err(self.damaged("its chunks are not as they were written")),
            }
        })
    }

    /// Returns the hash of the table and that of all chunks.
    fn read_chunks(
        &self,
        progress: &mut dyn FnMut(u64, u64),
        queue: SyncSender<(Chunk, Vec<u8>)>,
    ) -> Result<([u8; 32], [u8; 32]), ImageFileError> {
        let (mut hasher, mut all) = (blake3::Hasher::new(), blake3::Hasher::new());
        let mut end = HEADER_LEN as u64;
        for number in 1..=self.header.chunks {
            let bytes = self.entry(number)?;
            hasher.update(&bytes);
            let chunk = Chunk::decode(&bytes).map_err(|source| self.refuse(source))?;
            if chunk.at != end || chunk.end() > self.header.table_at {
                return Err(self.damaged("the chunks do not follow each other"));
            }
            end = chunk.end();
            let stored = self.stored(&chunk)?;
            // A packed chunk has bits that make no difference to what it holds.
            all.update(&stored);
            if queue.send((chunk, stored)).is_err() {
                // The other thread has found something, and says what.
                break;
            }
            progress(end, self.header.table_at);
        }
        if end != self.header.table_at {
            return Err(self.damaged("its table of chunks is not as it was written"));
        }
        Ok((*hasher.finalize().as_bytes(), *all.finalize().as_bytes()))
    }

    /// `entry` is the entry that was looked at last.
    fn verify_pieces(
        &self,
        pieces: &[Piece],
        entry: &mut Option<(u64, Chunk)>,
    ) -> Result<(), ImageFileError> {
        for &Piece(number, at, length) in pieces {
            if number == 0 {
                continue;
            }
            let chunk = match entry {
                Some((known, chunk)) if *known == number => *chunk,
                _ => entry.insert((number, self.chunk(number)?)).1,
            };
            let fits = at.checked_add(length).is_some_and(|end| end <= chunk.plain);
            if chunk.kind != ChunkKind::Data || !fits {
                return Err(self.damaged("a record refers to something that is no data"));
            }
        }
        Ok(())
    }

    /// The record stream from its beginning.
    pub fn records(&self) -> Records<'_> {
        Records { stream: Stream::new(self), ended: false }
    }

    /// The contents that records refer to.
    pub fn contents(&self) -> Contents<'_> {
        Contents { image: self, cache: VecDeque::new() }
    }

    fn entry(&self, number: u64) -> Result<[u8; ENTRY_LEN], ImageFileError> {
        if !(1..=self.header.chunks).contains(&number) {
            return Err(self.damaged("a record refers to a chunk that is not there"));
        }
        let mut bytes = [0; ENTRY_LEN];
        let at = self.header.table_at + (number - 1) * ENTRY_LEN as u64;
        self.file.read_exact_at(&mut bytes, at).map_err(failed("read", &self.path))?;
        Ok(bytes)
    }

    fn chunk(&self, number: u64) -> Result<Chunk, ImageFileError> {
        Chunk::decode(&self.entry(number)?).map_err(|source| self.refuse(source))
    }

    fn stored(&self, chunk: &Chunk) -> Result<Vec<u8>, ImageFileError> {
        let mut stored = vec![0; chunk.stored.min(CHUNK_MAX) as usize];
        self.file.read_exact_at(&mut stored, chunk.at).map_err(failed("read", &self.path))?;
        Ok(stored)
    }

    fn load(&self, chunk: &Chunk) -> Result<Vec<u8>, ImageFileError> {
        chunk.open(self.stored(chunk)?).map_err(|source| self.refuse(source))
    }

    fn refuse(&self, source: ImageError) -> ImageFileError {
        ImageFileError::Contents { path: self.path.clone(), source }
    }

    fn damaged(&self, what: &str) -> ImageFileError {
        self.refuse(ImageError::damaged(what))
    }
}

/// The records of an [`Image`], in order.
#[derive(Debug)]
pub struct Records<'a> {
    stream: Stream<'a>,
    ended: bool,
}

impl Records<'_> {
    /// The next one; `None` behind the last.
    #[expect(clippy::should_implement_trait, reason = "an iterator cannot fail and be used with ?")]
    pub fn next(&mut self) -> Result<Option<Record>, ImageFileError> {
        let image = self.stream.image;
        if self.ended {
            return Ok(None);
        }
        let decoded = codec::decode_from::<Record>("a record", &mut self.stream);
        if let Some(failure) = self.stream.failure.take() {
            return Err(failure);
        }
        let record = decoded.map_err(|source| image.refuse(source))?;
        record.check(self.stream.next).map_err(|source| image.refuse(source))?;
        if matches!(record, Record::End) {
            self.ended = true;
            if !self.stream.is_at_end()? {
                return Err(image.damaged("records behind the last one"));
            }
            return Ok(None);
        }
        Ok(Some(record))
    }
}

/// The bytes of the record stream.
#[derive(Debug)]
struct Stream<'a> {
    image: &'a Image,
    /// The number of the chunk to look at next.
    next: u64,
    current: Vec<u8>,
    used: usize,
    /// Why there are no more bytes, if not for the end.
    failure: Option<ImageFileError>,
}

impl<'a> Stream<'a> {
    fn new(image: &'a Image) -> Self {
        Self { image, next: 1, current: Vec::new(), used: 0, failure: None }
    }

    /// Loads the next chunk of records, if there is one.
    fn advance(&mut self) -> Result<bool, ImageFileError> {
        while self.next <= self.image.header.chunks {
            let chunk = self.image.chunk(self.next)?;
            self.next += 1;
            if chunk.kind == ChunkKind::Records {
                (self.current, self.used) = (self.image.load(&chunk)?, 0);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_at_end(&mut self) -> Result<bool, ImageFileError> {
        Ok(self.used == self.current.len() && !self.advance()?)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.current.len() {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return Ok(0),
                Err(failure) => {
                    self.failure = Some(failure);
                    return Ok(0);
                }
            }
        }
        let count = buffer.len().min(self.current.len() - self.used);
        buffer[..count].copy_from_slice(&self.current[self.used..self.used + count]);
        self.used += count;
        Ok(count)
    }
}

/// What the records of an [`Image`] refer to, with a few chunks kept open.
#[derive(Debug)]
pub struct Contents<'a> {
    image: &'a Image,
    cache: VecDeque<(u64, Arc<Vec<u8>>)>,
}

impl Contents<'_> {
    /// The contents of pieces, one behind the other.
    pub fn get(&mut self, pieces: &[Piece]) -> Result<Vec<u8>, ImageFileError> {
        let length: usize = pieces.iter().map(|piece| piece.2 as usize).sum();
        let mut out = Vec::with_capacity(length.min(CHUNK_MAX as usize));
        for &Piece(number, at, length) in pieces {
            if number == 0 {
                out.resize(out.len() + length as usize, 0);
                continue;
            }
            let chunk = self.chunk(number)?;
            let end = (at as usize).saturating_add(length as usize);
            let piece = chunk.get(at as usize..end);
            out.extend(piece.ok_or_else(|| self.image.damaged("a record refers behind a chunk"))?);
        }
        Ok(out)
    }

    fn chunk(&mut self, number: u64) -> Result<Arc<Vec<u8>>, ImageFileError> {
        if let Some(at) = self.cache.iter().position(|(known, _)| *known == number)
            && let Some(found) = self.cache.remove(at)
        {
            let chunk = found.1.clone();
            self.cache.push_front(found);
            return Ok(chunk);
        }
        let opened = Arc::new(self.image.load(&self.image.chunk(number)?)?);
        self.cache.truncate(CACHED - 1);
        self.cache.push_front((number, opened.clone()));
        Ok(opened)
    }
}
