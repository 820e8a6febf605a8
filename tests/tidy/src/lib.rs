//! Keeps the promises of `ARCHITECTURE.md` that a compiler cannot keep: which crate may use
//! which, where a library or a keyword may be named, how long a file may grow, and that every
//! document can be reached and every link leads somewhere.
//!
//! It reads the tree as text and depends on nothing, so it says what is wrong within a second
//! even when the rest does not compile.
#![forbid(unsafe_code)]
#![cfg(test)]

mod docs;
mod layers;
mod names;
mod tree;
mod words;
