//! Values that prove themselves: the writer can compute again what a key must hold.

/// The value that `writer` stores under key number `key` the `sequence`th time, `length` bytes
/// long: a readable head, a body that depends on all of it, and a checksum at the end.
pub fn value(writer: u64, key: u64, sequence: u64, length: usize) -> Vec<u8> {
    let head = format!("{writer}/{key}/{sequence}/");
    let mut bytes = Vec::with_capacity(length.max(head.len() + CHECKSUM_BYTES));
    bytes.extend_from_slice(head.as_bytes());
    let mut state = mix(writer ^ mix(key ^ mix(sequence)));
    while bytes.len() + CHECKSUM_BYTES < length {
        state = mix(state);
        let room = length - CHECKSUM_BYTES - bytes.len();
        let word = state.to_le_bytes();
        bytes.extend_from_slice(word.get(..room.min(8)).unwrap_or(&word));
    }
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
    bytes
}

/// What is wrong with a value, in words, or nothing where it is the expected one.
pub fn difference(expected: &[u8], found: Option<&[u8]>) -> Option<String> {
    let Some(found) = found else { return Some("the key is missing".to_owned()) };
    if expected == found {
        return None;
    }
    let split = found.len().saturating_sub(CHECKSUM_BYTES);
    let (body, checksum) = found.split_at(split);
    let head = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
    let head = head.rsplit_once('/').map_or("", |(numbers, _)| numbers);
    let intact = checksum == &blake3::hash(body).as_bytes()[..checksum.len().min(32)];
    Some(if intact && !head.is_empty() {
        format!("an intact value of another write: {head}")
    } else {
        let at = expected.iter().zip(found).take_while(|(a, b)| a == b).count();
        format!("a damaged value of {} bytes, different from byte {at} on", found.len())
    })
}

const CHECKSUM_BYTES: usize = 8;

/// A fast, well-mixing permutation of 64 bits (the finaliser of splitmix64).
pub fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_asked_length_and_differ() {
        assert_eq!(value(1, 2, 3, 256).len(), 256);
        assert_ne!(value(1, 2, 3, 256), value(1, 2, 4, 256));
    }

    #[test]
    fn differences_are_named() {
        let good = value(1, 2, 3, 64);
        assert_eq!(difference(&good, Some(&good)), None);
        assert!(difference(&good, None).unwrap().contains("missing"));
        let old = value(1, 2, 2, 64);
        assert!(difference(&good, Some(&old)).unwrap().contains("1/2/2"));
        let mut damaged = good.clone();
        damaged[40] ^= 1;
        assert!(difference(&good, Some(&damaged)).unwrap().contains("byte 40"));
        assert!(difference(&good, Some(b"")).is_some());
    }
}
