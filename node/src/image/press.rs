//! Packs chunks and writes them, on a thread of its own: while one chunk is compressed, hashed and
//! written, the VE is read for the next ones.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use ckpt_engine::sys::writeback::start_writeback;
use ckpt_format::image::{Chunk, ChunkKind, Coding, HEADER_LEN};
use zstd::bulk::Compressor;

use super::{ImageFileError, draft::failed};

/// Chunks that may wait.
const QUEUE: usize = 4;
/// What is written is on its way to the disk when it is as much as this, in bytes: else all of it
/// would go there at the end.
const WRITEBACK: u64 = 16 << 20;
/// Behind a chunk that did not shrink so much of the next is compressed to see whether that would.
const SAMPLE: usize = 16 << 10;

/// A chunk to be written.
type Full = (Vec<u8>, ChunkKind);

/// The thread. Dropped, it ends once it has written what waits.
#[derive(Debug)]
pub(super) struct Press {
    queue: Option<SyncSender<Full>>,
    thread: Option<JoinHandle<io::Result<Pressed>>>,
    at: Arc<AtomicU64>,
}

/// All chunks, as they are in the file.
#[derive(Debug)]
pub(super) struct Pressed {
    pub(super) table: Vec<Chunk>,
    /// Where the next byte goes.
    pub(super) at: u64,
    pub(super) hasher: blake3::Hasher,
}

impl Press {
    /// Writes behind the header of `file`. `level` is that of zstd; 0 is none.
    pub(super) fn start(file: &File, path: &Path, level: u8) -> Result<Self, ImageFileError> {
        let file = file.try_clone().map_err(failed("write", path))?;
        let compressor = match level {
            0 => None,
            level => Some(Compressor::new(level.into()).map_err(failed("compress", path))?),
        };
        let at = Arc::new(AtomicU64::new(HEADER_LEN as u64));
        let (queue, full) = sync_channel::<Full>(QUEUE);
        let written = at.clone();
        let work = move || {
            let mut packer = Packer { compressor, hopeless: false };
            let mut pressed =
                Pressed { table: Vec::new(), at: HEADER_LEN as u64, hasher: blake3::Hasher::new() };
            let mut begun = pressed.at;
            while let Ok((plain, kind)) = full.recv() {
                pressed.write(&file, &mut packer, &plain, kind)?;
                written.store(pressed.at, Ordering::Relaxed);
                if pressed.at - begun >= WRITEBACK {
                    start_writeback(file.as_fd(), begun, pressed.at - begun)?;
                    begun = pressed.at;
                }
            }
            Ok(pressed)
        };
        let thread = std::thread::Builder::new().name("press".into()).spawn(work);
        let thread = thread.map_err(failed("write", path))?;
        Ok(Self { queue: Some(queue), thread: Some(thread), at })
    }

    /// How much of the file is written, in bytes.
    pub(super) fn at(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }

    /// Hands a chunk over. An error is that of an earlier one.
    pub(super) fn put(&mut self, plain: Vec<u8>, kind: ChunkKind) -> io::Result<()> {
        let sent = self.queue.as_ref().is_some_and(|queue| queue.send((plain, kind)).is_ok());
        if sent { Ok(()) } else { self.end().and(Err(io::ErrorKind::BrokenPipe.into())) }
    }

    /// Waits until everything is written.
    pub(super) fn end(&mut self) -> io::Result<Pressed> {
        self.queue = None;
        let thread = self.thread.take().ok_or(io::ErrorKind::BrokenPipe)?;
        thread.join().map_err(|_| io::Error::other("the thread that writes it panicked"))?
    }
}

impl Drop for Press {
    fn drop(&mut self) {
        // Given up, or failed and told so.
        let _ = self.end();
    }
}

impl Pressed {
    fn write(
        &mut self,
        mut file: &File,
        packer: &mut Packer,
        plain: &[u8],
        kind: ChunkKind,
    ) -> io::Result<()> {
        let packed = packer.pack(plain)?;
        let coding = if packed.is_some() { Coding::Zstd } else { Coding::Plain };
        let stored = packed.as_deref().unwrap_or(plain);
        file.write_all(stored)?;
        self.hasher.update(stored);
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let hash = *blake3::hash(plain).as_bytes();
        let (stored, plain) = (length(stored), length(plain));
        self.table.push(Chunk { hash, at: self.at, stored, plain, kind, coding });
        self.at += u64::from(stored);
        Ok(())
    }
}

/// Compresses what shrinks.
struct Packer {
    compressor: Option<Compressor<'static>>,
    /// The last chunk did not shrink.
    hopeless: bool,
}

impl Packer {
    /// The chunk compressed, if it is smaller so.
    fn pack(&mut self, plain: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Some(compressor) = &mut self.compressor else { return Ok(None) };
        if self.hopeless && plain.len() > 2 * SAMPLE {
            let middle = (plain.len() - SAMPLE) / 2;
            if compressor.compress(&plain[middle..][..SAMPLE])?.len() >= SAMPLE {
                return Ok(None);
            }
        }
        let packed = compressor.compress(plain)?;
        self.hopeless = packed.len() >= plain.len();
        Ok((!self.hopeless).then_some(packed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that nothing makes smaller.
    fn noise(len: usize) -> Vec<u8> {
        let mut noise = vec![0; len];
        rand::Rng::fill(&mut rand::rng(), noise.as_mut_slice());
        noise
    }

    #[test]
    fn what_shrinks_is_noticed_behind_what_does_not() {
        let compressor = Compressor::new(1).unwrap();
        let mut packer = Packer { compressor: Some(compressor), hopeless: false };
        let (noise, text) = (noise(256 << 10), vec![b'a'; 256 << 10]);
        for (plain, shrinks) in
            [(&noise, false), (&noise, false), (&text, true), (&noise, false), (&text, true)]
        {
            let packed = packer.pack(plain).unwrap();
            assert_eq!(packed.is_some(), shrinks);
            assert!(packed.is_none_or(|packed| packed.len() < 1000));
        }
    }

    #[test]
    fn a_file_that_takes_no_more_is_told_once_and_by_its_cause() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut press = Press::start(&full, Path::new("/dev/full"), 0).unwrap();
        let mut refused = None;
        for _ in 0..QUEUE + 3 {
            if let Err(error) = press.put(noise(4096), ChunkKind::Data) {
                refused.get_or_insert(error);
            }
        }
        let error = refused.expect("nothing fits there");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(press.end().is_err());
    }
}
