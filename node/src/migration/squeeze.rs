//! Whether a piece is worth compressing before it travels.
//!
//! It is when the link takes longer for what compression would save than compressing takes. Both
//! are measured all the time: what the link takes for a byte, queues, limits and all, and what
//! compression takes and leaves of the last pieces. On a fast link nothing is compressed but one
//! piece in many, to know what it would cost and save.

use std::{
    cell::RefCell,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use zstd::bulk::{Compressor, Decompressor};

use super::share::Share;

/// The fastest that saves anything worth it.
const LEVEL: i32 = 1;
/// Smaller pieces travel as they are.
const SMALLEST: usize = 16 << 10;
/// One in so many is compressed although it does not pay, to see whether it would.
const PROBE: u32 = 512;
/// What is known of the link and of the data.
#[derive(Debug, Default)]
struct Scale {
    /// Seconds of the link for a byte.
    link: Share,
    /// Seconds to compress a byte.
    cost: Share,
    /// Bytes that are left of one.
    left: Share,
    since_probe: u32,
}

impl Scale {
    /// Whether to compress the next piece.
    fn wants(&mut self) -> bool {
        let Some(link) = self.link.get() else { return false };
        self.since_probe += 1;
        let pays = match (self.cost.get(), self.left.get()) {
            (Some(cost), Some(left)) => cost < link * (1.0 - left),
            _ => true,
        };
        if pays || self.since_probe >= PROBE {
            self.since_probe = 0;
            return true;
        }
        false
    }

    fn compressed(&mut self, before: usize, after: usize, time: Duration) {
        self.cost.add(before, time.as_secs_f64());
        self.left.add(before, after as f64);
    }

    fn sent(&mut self, bytes: usize, time: Duration) {
        self.link.add(bytes, time.as_secs_f64());
    }
}

thread_local! {
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
}

/// Decides for one stream.
#[derive(Debug, Default)]
pub(super) struct Squeeze(Mutex<Scale>);

impl Squeeze {
    fn scale(&self) -> MutexGuard<'_, Scale> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in how long the stream was busy with so many bytes.
    pub(super) fn sent(&self, bytes: usize, time: Duration) {
        self.scale().sent(bytes, time);
    }

    /// Seconds that the link takes for a byte, as far as that is known.
    pub(super) fn link(&self) -> Option<f64> {
        self.scale().link.get()
    }

    /// The piece compressed, if that pays.
    pub(super) fn squeeze(&self, piece: &[u8]) -> Option<Bytes> {
        if piece.len() < SMALLEST || !self.scale().wants() {
            return None;
        }
        let start = Instant::now();
        let compressed = compress(piece).ok()?;
        self.scale().compressed(piece.len(), compressed.len(), start.elapsed());
        (compressed.len() < piece.len()).then(|| compressed.into())
    }
}

fn compress(piece: &[u8]) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| {
        let compressor = match kept {
            Some(compressor) => compressor,
            None => kept.insert(Compressor::new(LEVEL)?),
        };
        compressor.compress(piece)
    })
}

/// What was compressed, when it has this length.
pub(super) fn release(compressed: &[u8], len: usize) -> io::Result<Bytes> {
    let piece = Decompressor::new()?.decompress(compressed, len)?;
    if piece.len() == len {
        return Ok(piece.into());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "shorter than announced"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = 1 << 20;

    /// Plays pieces that shrink to `left`, compressed at `cost` and sent at `link` bytes per second.
    fn compressed_of_many(link: f64, cost: f64, left: f64) -> usize {
        let mut scale = Scale::default();
        let mut count = 0;
        for _ in 0..10_000 {
            let mut travels = PIECE;
            if scale.wants() {
                count += 1;
                travels = (PIECE as f64 * left) as usize;
                scale.compressed(PIECE, travels, Duration::from_secs_f64(PIECE as f64 / cost));
            }
            scale.sent(travels, Duration::from_secs_f64(travels as f64 / link));
        }
        count
    }

    #[test]
    fn a_slow_link_is_helped() {
        assert!(compressed_of_many(100e6, 400e6, 0.4) > 9_990);
    }

    #[test]
    fn on_a_fast_link_it_is_switched_off_but_for_probes() {
        let count = compressed_of_many(2000e6, 400e6, 0.4);
        assert!((10..30).contains(&count), "{count}");
    }

    #[test]
    fn what_does_not_shrink_travels_as_it_is() {
        let count = compressed_of_many(100e6, 400e6, 1.0);
        assert!((10..30).contains(&count), "{count}");
    }

    #[test]
    fn a_link_that_becomes_slow_is_noticed() {
        let mut scale = Scale::default();
        scale.compressed(PIECE, PIECE / 2, Duration::from_millis(3));
        for _ in 0..100 {
            scale.sent(PIECE, Duration::from_micros(500));
        }
        assert!(!scale.wants());
        for _ in 0..30 {
            scale.sent(PIECE, Duration::from_millis(10));
        }
        assert!(scale.wants());
    }

    #[test]
    fn a_piece_comes_back_and_damage_is_refused() {
        let squeeze = Squeeze::default();
        let piece: Vec<u8> = (0..PIECE).map(|at| (at / 100) as u8).collect();
        assert!(squeeze.squeeze(&piece).is_none(), "nothing is known of the link");
        squeeze.sent(PIECE, Duration::from_secs(1));
        let compressed = squeeze.squeeze(&piece).expect("the link is slow");
        assert!(compressed.len() < PIECE / 10);
        assert_eq!(release(&compressed, PIECE).unwrap(), piece);
        assert!(release(&compressed, PIECE - 1).is_err());
        assert!(release(&compressed, PIECE + 1).is_err());
        assert!(release(&compressed[1..], PIECE).is_err());
        assert!(release(&[], PIECE).is_err());
    }
}
