//! Checkpoints: a whole VE as one file.
//!
//! ```text
//! header │ chunk 1 │ chunk 2 │ … │ chunk n │ table of chunks │ manifest
//! ```
//! The *header* is read by any build for ever: it says what wrote the file, in which version, and
//! where the rest is. A *chunk* is a piece of up to [`CHUNK_MAX`] bytes, known by the BLAKE3 hash of
//! its contents. There are two kinds: one holds pages and file data, each block once; the other
//! holds a piece of the *record stream*, which tells in order how the VE is built, and refers to
//! blocks by [`Piece`]s. The *manifest* says what the VE is and what it needs, without the
//! contents. Every byte of the file is covered by a hash that leads to the header's own.
//!
//! Values are CBOR with the names of their fields, so that a later version reads them although it
//! knows more fields. A new field is `#[serde(default)]`; what cannot be said so is a new
//! [`VERSION`]. `docs/reference/format.md` describes all of it for a second reader.

pub mod codec;
mod header;
mod manifest;
mod record;
mod table;

pub use self::{
    header::{HEADER_LEN, Header, MAGIC, VERSION},
    manifest::{Host, MANIFEST_MAX, Manifest, OwnFiles, Summary},
    record::{Contents, OwnFile, Piece, Record},
    table::{CHUNK_MAX, Chunk, ChunkKind, Coding, ENTRY_LEN},
};

/// Why bytes are no checkpoint that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Something else.
    #[error("this is no checkpoint")]
    Foreign,
    /// The end is missing.
    #[error("the checkpoint is cut off: it has {found} of {expected} bytes")]
    Short {
        /// How many bytes there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// It was written by a later build.
    #[error(
        "the checkpoint has version {version}, written by {writer}; this build reads up to {VERSION}"
    )]
    Newer {
        /// Its version.
        version: u32,
        /// What wrote it.
        writer: String,
    },
    /// A part is not as it was written.
    #[error("the checkpoint is damaged: {what}")]
    Damaged {
        /// Which part.
        what: String,
    },
}

impl ImageError {
    /// For a part that is not as it was written.
    pub fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}
