//! What would stop a move, found without one.

use std::{os::fd::AsFd, path::Path};

use ckpt_engine::{
    capture::{self, IdMap},
    container::{ID_COUNT, Spaces},
    files,
};
use ckpt_format::blocker::Blocker;

use super::{blackout::CopyError, holders::Holders};

/// Everything that would stop a move of this VE now; disturbs nothing.
pub(super) fn blockers(init: i32, id_base: u32, freezer: &Path) -> Result<Vec<Blocker>, CopyError> {
    let list = |source| CopyError::Process { pid: init, source };
    let holders = Holders::of(freezer)?;
    let pids: Vec<i32> = holders.hosts().collect();
    // First: where overlays are tells where the files of maps are.
    let spaces = Spaces::of(init, &pids).map_err(list)?;
    let ids = IdMap { base: id_base, count: ID_COUNT };
    let mut all = capture::check(freezer, ids).map_err(list)?;
    let (mounts, namespaces) = (spaces.mounts().map_err(list)?, spaces.numbers());
    let networks = spaces.networks().iter().map(AsFd::as_fd).collect();
    let holders = holders.source(init, id_base);
    all.extend(files::check(&files::Source { mounts, namespaces, networks, ..holders }));
    Ok(all)
}
