//! What came out, for people, for machines and as pictures.

pub mod chart;
pub mod outcome;
pub mod table;
