//! memfd_create(2). The contents travel with the VE's shared memory; here are only the
//! descriptions.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::{
    files::Kind,
    memory::{SharedKind, SharedObject},
};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    path,
    rebuild::{Rebuild, RebuildError, lossy},
};
use crate::sys::descriptor::{self, Query};

/// Whether a regular file is a memfd.
pub(super) fn is_memfd(object: &Object) -> bool {
    object.link.starts_with(b"/memfd:") && object.link.ends_with(b" (deleted)")
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let status = object.status;
    let offset = object.info()?.number("pos", 10)?;
    if !capture.files.memfds.iter().any(|memfd| memfd.id == status.inode) {
        let name = object.link.strip_prefix(b"/memfd:").unwrap_or(&[]);
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        let seals = descriptor::query(object.fd(), Query::GetSeals)?;
        capture.files.memfds.push(SharedObject {
            id: status.inode,
            size: status.size,
            kind: SharedKind::Memfd {
                name: lossy(name),
                seals: seals.cast_unsigned(),
                mode: status.mode,
                uid: capture.source.inside(status.uid),
                gid: capture.source.inside(status.gid),
            },
        });
    }
    Ok(Kind::Memfd { object: status.inode, offset })
}

pub(super) fn rebuild(
    rebuild: &Rebuild<'_>,
    object: u64,
    offset: u64,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let shared = rebuild.target.shared.get(&object).ok_or(RebuildError::Damaged)?;
    let failed = |source: io::Error| RebuildError::Kernel { object: "memfd", source };
    let fd = rebuild.target.reopen(shared.as_fd(), flags).map_err(failed)?;
    path::seek(fd, offset).map_err(failed)
}
