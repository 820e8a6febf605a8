//! Whether all attached segments are those of the IPC namespaces that their processes are in.
//!
//! A process can leave its IPC namespace (unshare(2)) and keep what it has attached. Of a mapping
//! the kernel tells only the segment's number, which is another segment's in another namespace. But
//! it counts how often each is attached: in a VE that stands still these are all that its
//! processes have.

use std::{collections::HashMap, os::fd::AsFd};

use ckpt_format::memory::Backing;

use super::{TrackError, Tracked};
use crate::{container::Spaces, ipc};

/// Refuses what was attached elsewhere. With one namespace there is nothing to be told apart.
pub(super) fn check<'a>(
    processes: impl Iterator<Item = &'a Tracked>,
    spaces: Option<&Spaces>,
) -> Result<(), TrackError> {
    let Some(spaces) = spaces.filter(|spaces| !spaces.ipcs().is_empty()) else { return Ok(()) };
    let mut found: HashMap<u64, u64> = HashMap::new();
    for tracked in processes {
        let own = ipc::namespace_of(tracked.host());
        for area in &tracked.space().areas {
            if let Backing::Shared { object } = area.backing
                && ipc::is_segment(object)
            {
                if !ipc::is_of(object, own) {
                    return Err(elsewhere(object));
                }
                *found.entry(object).or_default() += 1;
            }
        }
    }
    for namespace in spaces.ipc_namespaces() {
        let attached = ipc::attachments(namespace.as_fd())
            .map_err(|source| TrackError::Shared { object: 0, source })?;
        for (object, count) in attached {
            if found.remove(&object).unwrap_or(0) != count {
                return Err(elsewhere(object));
            }
        }
    }
    found.into_keys().next().map_or(Ok(()), |object| Err(elsewhere(object)))
}

fn elsewhere(object: u64) -> TrackError {
    TrackError::Elsewhere { number: object & u64::from(u32::MAX) }
}
