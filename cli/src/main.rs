//! The vz programs.

fn main() {}
