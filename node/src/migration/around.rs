//! What is around the processes of a VE that stands still: its cgroups, and who is in which
//! namespaces.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use ckpt_engine::{
    container::{Spaces, cgroups},
    procfs,
};
use ckpt_format::container::{Cgroup, Namespaces};

use super::blackout::CopyError;

/// What is around the processes of a VE.
pub(super) struct Around {
    pub(super) freezer: PathBuf,
    pub(super) visible: PathBuf,
    pub(super) id_base: u32,
    pub(super) spaces: Arc<Spaces>,
}

/// The namespaces of processes, as numbered on the host; `None` for one that nobody knows.
pub(super) type Places = HashMap<i32, Option<Namespaces>>;

impl Around {
    /// The cgroups of a VE that stands still, and the namespaces of its processes.
    pub(super) fn look(&self) -> Result<(Vec<Cgroup>, Places), CopyError> {
        let list = |source| CopyError::Process { pid: 0, source };
        let pids = procfs::cgroup_processes(&self.freezer).map_err(list)?;
        let number = |host| Some((host, self.spaces.number(host).ok()?));
        let place = |host| number(host).or_else(|| number(procfs::stand_in(host)?));
        let places = pids.into_iter().filter_map(place).collect();
        Ok((cgroups::capture(&self.visible, self.id_base)?, places))
    }
}
