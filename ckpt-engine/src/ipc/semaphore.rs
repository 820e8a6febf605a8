//! Sets of semaphores.

use std::io;

use ckpt_format::ipc::SemaphoreSet;

use super::{as_creator, numbered, permissions};
use crate::sys::ipc::{self, Family};

/// Makes the sets in the calling thread's namespace.
pub(crate) fn rebuild_sets(sets: &[SemaphoreSet], id_base: u32) -> io::Result<()> {
    for set in sets {
        let entry = set.entry;
        let count = set.values.len();
        let id = as_creator(&entry, id_base, || {
            numbered("sem", entry.id, || ipc::make_semaphores(entry.key, count))
        })?;
        ipc::set_semaphore_values(id, &set.values)?;
        ipc::set_permissions(Family::Semaphores, id, permissions(&entry, id_base))?;
    }
    Ok(())
}
