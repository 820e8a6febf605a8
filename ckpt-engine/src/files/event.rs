//! eventfd(2) and signalfd(2).

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
};

use ckpt_format::files::{EventCounter, Kind};

use super::{
    find::{Object, Refusal},
    rebuild::RebuildError,
};
use crate::sys;

pub(super) fn capture_event(object: &Object) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let count = info.number("eventfd-count", 16)?;
    // Kernels before 6.5 do not tell; there the flag is lost on the rare semaphore.
    let semaphore = info.number("eventfd-semaphore", 10).unwrap_or(0) != 0;
    Ok(Kind::Event(EventCounter { count, semaphore }))
}

pub(super) fn rebuild_event(event: EventCounter) -> Result<OwnedFd, RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "eventfd", source };
    let mut made = File::from(sys::event::event(event.semaphore).map_err(failed)?);
    if event.count != 0 {
        made.write_all(&event.count.to_ne_bytes()).map_err(failed)?;
    }
    Ok(made.into())
}

pub(super) fn capture_signal(object: &Object) -> Result<Kind, Refusal> {
    let mask = object.info()?.number("sigmask", 16)?;
    Ok(Kind::Signal { mask })
}

pub(super) fn rebuild_signal(mask: u64) -> Result<OwnedFd, RebuildError> {
    sys::event::signal(mask).map_err(|source| RebuildError::Kernel { object: "signalfd", source })
}
