//! Pressure files of cgroups, in which a service has asked to be woken when memory, processors or
//! disks are scarce.
//!
//! What was asked for was written into the file, and the kernel shows nobody what it was, only how
//! long: the offset of the description. A file in which nothing was asked for is always ready, so
//! a program that waits for it would never sleep again.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
};

use ckpt_format::files::PathFile;

use super::find::{Object, Refusal};

/// What systemd writes, and with it the services that use its library or its documentation.
const USUAL: &[u8] = b"some 200000 2000000\0";

fn is_pressure(path: &[u8]) -> bool {
    let kinds = [&b"/memory.pressure"[..], b"/cpu.pressure", b"/io.pressure"];
    kinds.iter().any(|kind| path.ends_with(kind))
}

fn is_written(flags: u32) -> bool {
    flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY
}

/// Refuses what was asked for in other words than the usual ones.
pub(super) fn check(object: &Object) -> Result<(), Refusal> {
    if object.is_path_only() || !is_pressure(&object.link) {
        return Ok(());
    }
    let info = object.info()?;
    let (flags, offset) = (info.number("flags", 8)?, info.number("pos", 10)?);
    if !is_written(u32::try_from(flags).unwrap_or(0)) || offset == 0 || is_usual(offset) {
        return Ok(());
    }
    Err(Refusal::new(
        "a watch on pressure with limits of its own",
        "stop the program, or let it use the limits of systemd",
    ))
}

/// The usual words, with or without the zero at their end.
fn is_usual(offset: u64) -> bool {
    [USUAL.len(), USUAL.len() - 1].contains(&usize::try_from(offset).unwrap_or(0))
}

/// Asks again for what was asked for in such a file, which also sets its offset.
pub(super) fn rebuild(fd: OwnedFd, file: &PathFile, flags: u32) -> io::Result<OwnedFd> {
    if !is_pressure(&file.path) || !is_written(flags) || !is_usual(file.offset) {
        return Ok(fd);
    }
    let length = usize::try_from(file.offset).unwrap_or(0);
    let mut written = std::fs::File::from(fd);
    written.write_all(&USUAL[..length])?;
    Ok(written.into())
}
