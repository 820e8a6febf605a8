//! The one place that knows how values become bytes.
//!
//! bincode 2.0.1 with its standard configuration, behind two functions, so that replacing it is
//! a change to this file. A length prefix found in the data never allocates more than
//! [`LIMIT`] bytes.

use serde::{Serialize, de::DeserializeOwned};

/// The largest encoded value accepted, in bytes.
pub const LIMIT: usize = 256 << 20;

/// Why bytes could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes do not hold a value of the wanted type.
    #[error("damaged or foreign data")]
    Damaged(#[source] bincode::error::DecodeError),
    /// There are fewer bytes than were announced.
    #[error("{wanted} bytes are announced, and not there")]
    Missing {
        /// How many should follow.
        wanted: usize,
    },
    /// The bytes are compressed, and not what they should become.
    #[error("damaged compressed data")]
    Compressed(#[source] std::io::Error),
    /// Bytes are left over behind the value.
    #[error("{surplus} surplus bytes behind the value")]
    Surplus {
        /// How many bytes were not used.
        surplus: usize,
    },
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a value. Our own types always encode.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, bincode::config::standard())
        .expect("plain data types always encode")
}

/// Decodes a value that must use all of `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(DecodeError::Damaged)?;
    match bytes.len() - used {
        0 => Ok(value),
        surplus => Err(DecodeError::Surplus { surplus }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_the_round_trip() {
        let value = (7u32, "eth0".to_owned(), vec![1u8, 2, 3]);
        assert_eq!(decode::<(u32, String, Vec<u8>)>(&encode(&value)).unwrap(), value);
    }

    #[test]
    fn surplus_bytes_are_refused() {
        let mut bytes = encode(&1u8);
        bytes.push(0);
        assert!(matches!(decode::<u8>(&bytes), Err(DecodeError::Surplus { surplus: 1 })));
    }

    #[test]
    fn a_huge_length_prefix_does_not_allocate() {
        // 253 marks a u64 in bincode's varint; the rest claims 2^60 bytes.
        let bytes = [253, 0, 0, 0, 0, 0, 0, 0, 16];
        assert!(matches!(decode::<Vec<u8>>(&bytes), Err(DecodeError::Damaged(_))));
    }
}
