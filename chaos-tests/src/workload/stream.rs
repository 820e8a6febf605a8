//! Endless streams of bytes that prove themselves: which byte comes at which place is known.

use super::outcome::{Failure, ensure};
use crate::client::record::mix;

/// One end's view of such a stream: how far it has come.
#[derive(Clone, Debug)]
pub struct Stream {
    seed: u64,
    place: u64,
}

impl Stream {
    /// The stream of this seed, from its first byte.
    pub fn new(seed: u64) -> Self {
        Self { seed, place: 0 }
    }

    /// Bytes that went through so far.
    pub fn place(&self) -> u64 {
        self.place
    }

    /// The next bytes, without going on.
    pub fn next(&self, count: usize) -> Vec<u8> {
        (self.place..).take(count).map(|place| self.byte(place)).collect()
    }

    /// Goes on by so many bytes.
    pub fn advance(&mut self, count: usize) {
        self.place += count as u64;
    }

    /// Checks that these are the next bytes, and goes on.
    #[track_caller]
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let wrong = (self.place..).zip(bytes).find(|(place, byte)| self.byte(*place) != **byte);
        ensure(wrong.is_none(), || {
            let place = wrong.map_or(0, |(place, _)| place);
            format!("byte {place} of a stream is wrong, {} right before it", place - self.place)
        })?;
        self.advance(bytes.len());
        Ok(())
    }

    fn byte(&self, place: u64) -> u8 {
        mix(self.seed ^ (place >> 3)).to_le_bytes()[(place & 7) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_a_repeated_and_a_changed_byte_are_seen() {
        let bytes = Stream::new(5).next(100);
        Stream::new(5).check(&bytes).unwrap();
        let mut changed = bytes.clone();
        changed[50] ^= 1;
        Stream::new(5).check(&changed).unwrap_err();
        let mut stream = Stream::new(5);
        stream.check(&bytes[..40]).unwrap();
        assert!(stream.clone().check(&bytes[41..]).is_err());
        assert!(stream.check(&bytes[39..]).is_err());
    }
}
