//! memfd_create(2). The contents travel with the VE's shared memory; here are only the
//! descriptions.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::Kind;

use super::{
    capture::Capture,
    find::{Object, Refusal},
    path,
    rebuild::{Rebuild, RebuildError},
};
use crate::{
    sys::descriptor::{self, Change},
    unnamed,
};

/// Whether a regular file is a memfd.
pub(super) fn is_memfd(object: &Object) -> bool {
    unnamed::memfd_name(&object.link).is_some()
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let offset = object.info()?.number("pos", 10)?;
    let object = capture.keep_contents(id)?;
    Ok(Kind::Memfd { object, offset })
}

/// The first one to read and write is that which memfd_create(2) gave: it does not keep the memfd
/// from being run as a program, as any other does.
pub(super) fn rebuild(
    rebuild: &mut Rebuild<'_>,
    object: u64,
    offset: u64,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let shared = rebuild.target.shared.get(&object).ok_or(RebuildError::Damaged)?;
    let failed = |source: io::Error| RebuildError::Kernel { object: "memfd", source };
    let status = flags.cast_signed();
    // Its contents may still be written here, by their places.
    let is_plain = status & (libc::O_ACCMODE | libc::O_PATH | libc::O_APPEND) == libc::O_RDWR;
    let fd = if is_plain && rebuild.taken.insert(object) {
        let fd = shared.try_clone().map_err(failed)?;
        let lasting = status & (libc::O_NONBLOCK | libc::O_NOATIME);
        descriptor::change(fd.as_fd(), Change::SetFlags, lasting).map_err(failed)?;
        fd
    } else {
        rebuild.target.reopen(shared.as_fd(), flags).map_err(failed)?
    };
    path::seek(fd, offset).map_err(failed)
}
