//! Which programs run files of which kinds (binfmt_misc).

use serde::{Deserialize, Serialize};

/// A file system of binfmt_misc, with all that is registered in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interpreters {
    /// Where it is mounted inside the VE.
    #[serde(with = "serde_bytes")]
    pub point: Vec<u8>,
    /// All of them count.
    pub enabled: bool,
    /// Those that are registered, the oldest first: of two that fit the newer one counts.
    pub entries: Vec<Interpreter>,
}

/// A program that runs files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interpreter {
    /// The name by which it is registered.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// It counts.
    pub enabled: bool,
    /// The program.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `P`, `O`, `C` and `F`.
    pub flags: String,
    /// Which files it runs.
    pub pattern: Pattern,
}

/// Which files a program runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pattern {
    /// Those whose names end so, behind a point.
    Extension(serde_bytes::ByteBuf),
    /// Those with these bytes at a place.
    Magic {
        /// Where.
        offset: u32,
        /// The bytes.
        magic: serde_bytes::ByteBuf,
        /// Which of their bits count; empty for all.
        mask: serde_bytes::ByteBuf,
    },
}
