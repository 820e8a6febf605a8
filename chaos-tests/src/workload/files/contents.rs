//! What is in files: holes, far ends, names that change, and sealed memory files.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

fn make(context: &Context, name: &str) -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).create_new(true).open(context.path(name))?)
}

/// Where a file has data, up to its end.
fn islands(file: &File) -> Result<Vec<i64>, Failure> {
    let mut starts = Vec::new();
    let mut at = 0;
    loop {
        at = match lseek(file, at, Whence::SeekData) {
            Err(Errno::ENXIO) => return Ok(starts),
            found => found?,
        };
        starts.push(at);
        at = lseek(file, at, Whence::SeekHole)?;
    }
}

pub(super) fn sparse(context: &mut Context) -> Result<(), Failure> {
    const FAR: u64 = 1 << 40;
    const GAP: u64 = 64 << 20;
    let file = make(context, "sparse")?;
    file.set_len(FAR)?;
    for number in 0..8 {
        file.write_all_at(&[number as u8 + 1; 4096], number * GAP)?;
    }
    let expected: Vec<i64> = (0..8).map(|number| number * GAP as i64).collect();
    while context.step(Duration::from_millis(15))? {
        same("its size", file.metadata()?.len(), FAR)?;
        if context.progress.plant() {
            file.write_all_at(&[1], 7 * GAP + (32 << 20))?;
        }
        same("where it has data", islands(&file)?, expected.clone())?;
        let blocks = file.metadata()?.blocks();
        ensure(blocks < 4096, || format!("a file of holes takes {blocks} blocks"))?;
        for number in 0..8 {
            let mut found = [0; 4096];
            file.read_exact_at(&mut found, number * GAP)?;
            same("what is between holes", found, [number as u8 + 1; 4096])?;
        }
    }
    Ok(())
}

pub(super) fn far(context: &mut Context) -> Result<(), Failure> {
    const START: u64 = (5 << 30) + 123;
    let mut file = make(context, "far")?;
    file.seek(SeekFrom::Start(START))?;
    let mut written = 0;
    while context.step(Duration::from_millis(8))? {
        file.write_all(&[mix(written) as u8])?;
        written += 1;
        same("an offset behind 4 GiB", file.stream_position()?, START + written)?;
        same("the size", file.metadata()?.len(), START + written)?;
        let mut byte = [0];
        let place = mix(written) % written;
        if context.progress.plant() {
            file.write_all_at(&vec![0; written as usize], START)?;
            file.write_all_at(&vec![1; written as usize], START)?;
        }
        file.read_exact_at(&mut byte, START + place)?;
        same("a byte behind 4 GiB", byte[0], mix(place) as u8)?;
    }
    Ok(())
}

pub(super) fn renamed(context: &mut Context) -> Result<(), Failure> {
    fs::create_dir(context.path("other"))?;
    let names = ["one", "two", "other/three"].map(|name| context.path(name));
    let mut file = make(context, "one")?;
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        same("the name of an open file", link, names[turn % 3].clone())?;
        file.write_all(&[mix(turn as u64) as u8])?;
        turn += 1;
        fs::rename(&names[(turn - 1) % 3], &names[turn % 3])?;
        if context.progress.plant() {
            fs::write(&names[turn % 3], b"")?;
        }
        let bytes = fs::read(&names[turn % 3])?;
        let right = bytes.iter().zip(0..).all(|(byte, at)| *byte == mix(at) as u8);
        ensure(right && bytes.len() == turn, || "a renamed file is another".to_owned())?;
    }
    Ok(())
}

fn memory_file(name: &str) -> Result<File, Failure> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?.into())
}

pub(super) fn sealed(context: &mut Context) -> Result<(), Failure> {
    let mut whole = memory_file("sealed")?;
    whole.write_all(&[5; 10_000])?;
    let all = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    fcntl(&whole, FcntlArg::F_ADD_SEALS(all))?;
    let growing = memory_file("growing")?;
    fcntl(&growing, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    let mut length = 0;
    whole.seek(SeekFrom::Start(77))?;
    while context.step(Duration::from_millis(8))? {
        same("seals", fcntl(&whole, FcntlArg::F_GET_SEALS)?, all.bits())?;
        same("writing to it", whole.write(b"x").map_err(|it| it.raw_os_error()), Err(Some(1)))?;
        same("its offset", whole.stream_position()?, 77)?;
        let mut byte = [0; 3];
        whole.read_exact_at(&mut byte, 9_997)?;
        same("its end", byte, [5; 3])?;
        length += 10;
        growing.set_len(length)?;
        let shorter = growing.set_len(length - 1).map_err(|it| it.raw_os_error());
        same("making one shorter", shorter, Err(Some(1)))?;
        let link = fs::read_link(format!("/proc/self/fd/{}", whole.as_raw_fd()))?;
        same("its name", link, "/memfd:sealed (deleted)".into())?;
        if context.progress.plant() {
            fcntl(&growing, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
        }
    }
    Ok(())
}

pub(super) fn memory(context: &mut Context) -> Result<(), Failure> {
    const PAGES: usize = 300;
    let file = memory_file("mapped")?;
    file.set_len((PAGES * 4096) as u64)?;
    let map = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
    // One that nobody maps, and another description of it for reading.
    let mut plain = memory_file("plain")?;
    let reader = File::open(format!("/proc/self/fd/{}", plain.as_raw_fd()))?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(6))? {
        let word = turn as usize * 1009 % map.words();
        map.word(word).store(turn, SeqCst);
        let mut bytes = [0; 8];
        if context.progress.plant() {
            map.word(word).store(turn + 1, SeqCst);
        }
        file.read_exact_at(&mut bytes, word as u64 * 8)?;
        same("a mapped word read from the file", u64::from_ne_bytes(bytes), turn)?;
        plain.write_all(&turn.to_ne_bytes())?;
        let mut last = Vec::new();
        let (mut other, at) = (&reader, turn * 8);
        other.seek(SeekFrom::Start(at))?;
        other.read_to_end(&mut last)?;
        same("what was written", last, turn.to_ne_bytes().to_vec())?;
        same("its length", reader.metadata()?.len(), (turn + 1) * 8)?;
        turn += 1;
    }
    Ok(())
}
