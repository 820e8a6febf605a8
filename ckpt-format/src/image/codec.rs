//! The one place that knows how the values of a checkpoint become bytes: CBOR (RFC 8949).
//!
//! Structures are maps with the names of their fields, variants of enumerations are their name,
//! or a map of one entry from the name to what it holds.

use std::io::Read;

use serde::{Serialize, de::DeserializeOwned};

use super::ImageError;

/// The largest value accepted, in bytes.
pub const VALUE_MAX: u64 = 256 << 20;

/// Encodes a value. Our own types always encode.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("plain data types always encode");
    bytes
}

/// Decodes a value that must use all of `bytes`.
pub fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    let mut rest = bytes;
    let value = decode_from(what, &mut rest)?;
    match rest.len() {
        0 => Ok(value),
        surplus => Err(ImageError::damaged(format!("{surplus} surplus bytes behind {what}"))),
    }
}

/// Decodes the next value of a stream. Memory is taken as its bytes come, never as they promise.
pub fn decode_from<T: DeserializeOwned>(
    what: &str,
    bytes: &mut impl Read,
) -> Result<T, ImageError> {
    let mut bounded = bytes.take(VALUE_MAX);
    ciborium::from_reader(&mut bounded)
        .map_err(|error| ImageError::damaged(format!("{what} cannot be read ({error})")))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Serialize)]
    struct Now {
        name: String,
        later: u32,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Before {
        name: String,
        #[serde(default)]
        missing: Vec<u32>,
    }

    #[test]
    fn fields_are_known_by_name() {
        let bytes = encode(&Now { name: "eth0".into(), later: 7 });
        let before: Before = decode("a value", &bytes).unwrap();
        assert_eq!(before, Before { name: "eth0".into(), missing: Vec::new() });
    }

    #[test]
    fn surplus_bytes_are_refused() {
        let mut bytes = encode(&1u8);
        bytes.push(0);
        assert!(decode::<u8>("a number", &bytes).is_err());
    }

    #[test]
    fn a_huge_length_does_not_allocate() {
        // A byte string and an array that claim 2^60 elements.
        for kind in [0x5b, 0x9b] {
            let bytes = [kind, 0x10, 0, 0, 0, 0, 0, 0, 0];
            assert!(decode::<Vec<u8>>("bytes", &bytes).is_err());
        }
    }
}
