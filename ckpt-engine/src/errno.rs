//! `io::Error` by its number, for errors that cross to another process.

use std::io;

use serde::{Deserialize, Deserializer, Serializer};

pub(crate) fn serialize<S: Serializer>(error: &io::Error, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<io::Error, D::Error> {
    i32::deserialize(from).map(io::Error::from_raw_os_error)
}
