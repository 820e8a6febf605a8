//! See ARCHITECTURE.md.
pub mod network;
