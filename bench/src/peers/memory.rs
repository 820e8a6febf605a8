//! How fast this machine copies memory: nothing that moves memory can be faster.

use std::hint::black_box;
use std::time::Instant;

/// Bytes per second of copying so many MiB that no cache can hold.
pub fn copy_rate(mib: usize) -> f64 {
    let from = vec![1u8; mib << 20];
    let mut to = vec![2u8; mib << 20];
    let begun = Instant::now();
    to.copy_from_slice(black_box(&from));
    black_box(&to);
    to.len() as f64 / begun.elapsed().as_secs_f64()
}
