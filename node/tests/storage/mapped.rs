//! Stores through a shared mapping leave no trace in a file's times.

use std::{
    fs::OpenOptions,
    os::{fd::AsFd, linux::fs::MetadataExt},
    path::Path,
    sync::atomic::Ordering,
};

use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::{compare::assert_equal, pair::Pair};

/// A file that this process has mapped.
struct Mapper(Map);

impl Mapper {
    /// Maps a file. Returns its device and inode, as stat(2) and as the mapping show them.
    fn new(path: &Path) -> (Self, [u64; 4]) {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let status = file.metadata().unwrap();
        let pages = usize::try_from(status.len()).unwrap().div_ceil(PAGE_BYTES);
        let map = Map::new(pages, Backing::FileShared(file.as_fd())).unwrap();
        let [device, inode] = shown(map.address());
        (Self(map), [status.st_dev(), status.st_ino(), device, inode])
    }

    /// Changes a byte.
    fn store(&mut self, offset: usize) {
        self.0.word(offset / 8).fetch_xor(0x20 << (offset % 8 * 8), Ordering::Relaxed);
    }
}

/// The device and the inode of the mapping at an address, as `/proc` shows them.
fn shown(address: usize) -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{address:08x}-"))).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let (major, minor) = words[3].split_once(':').unwrap();
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    [nix::sys::stat::makedev(number(major), number(minor)), words[4].parse().unwrap()]
}

/// A pair with a mapped file in the VE's own files, whose tracker trusts the times at once.
fn mapped_pair() -> (Pair, Mapper, [u64; 4]) {
    let mut pair = Pair::new(|_| ());
    let plan = pair.source.plan();
    let tracker = node::storage::FileTracker::new(pair.source.trees(&plan));
    pair.tracker = tracker.with_write_time_max(-3600);
    pair.source.inside(0, |top| std::fs::write(top.join("file"), vec![b'.'; 300_000]));
    let (mut mapper, numbers) = Mapper::new(&pair.source.path(0).join("file"));
    mapper.store(0);
    pair.round(false).unwrap();
    // The page is dirty already, so this store is not seen by the kernel.
    mapper.store(1);
    (pair, mapper, numbers)
}

#[test]
fn stores_to_a_mapped_file_are_found_by_its_numbers() {
    for form in [0, 2] {
        let (mut pair, mut mapper, numbers) = mapped_pair();
        pair.mapped.insert((numbers[form], numbers[form + 1]));
        pair.round(false).unwrap();
        assert_equal(&pair, "mapped");
        mapper.store(2);
        drop(mapper);
        // No longer mapped, but what was stored after the last look must still be found.
        pair.mapped.clear();
        pair.round(true).unwrap();
        assert_equal(&pair, "no longer mapped");
    }
}

#[test]
fn without_the_numbers_they_are_missed() {
    // If this fails, the test above proves nothing. When the kernel happens to write the page to the
    // disk between the two stores, the second one leaves a trace.
    let is_missed = || {
        let (mut pair, _mapper, _) = mapped_pair();
        pair.round(false).unwrap().data_bytes == 0
    };
    assert!((0..5).any(|_| is_missed()));
}

#[test]
fn stores_to_a_mapped_file_in_memory_are_always_found() {
    let mut pair = Pair::new(|_| ());
    let tree = *pair.numbers.last().unwrap();
    pair.source.inside(tree, |top| std::fs::write(top.join("file"), vec![b'.'; 9000]));
    let (mut mapper, _) = Mapper::new(&pair.source.path(tree).join("file"));
    pair.round(false).unwrap();
    mapper.store(8000);
    drop(mapper);
    pair.round(true).unwrap();
    assert_equal(&pair, "in memory");
}
