//! What programs remember of their pidfds.
//!
//! Since Linux 6.9 a pidfd has an inode of its own (fs/pidfs.c), whose number no other process
//! ever gets: the one way to tell a process from a later one with the same pid. systemd keeps that
//! number beside the descriptor (`struct PidRef`: pid, descriptor, inode) and asks it whether who
//! speaks is who it has started. A rebuilt process has another number, and nothing can choose it.
//! systemd would not know its own services again: it would turn down what they say, and kill them
//! when their watchdogs run out.
//!
//! So the number is renewed where a program has written it beside the descriptor. Only the heap
//! (brk(2)) is searched, and only that of a process which holds pidfds. What is taken for such a
//! place names an open pidfd of this very process and, right behind it, the 64 bits of the number
//! which that pidfd had: nothing else looks like that by chance.

use std::{collections::BTreeMap, io};

use ckpt_format::{
    files::{FileId, Files, Kind},
    memory::Backing,
    process::{Descriptor, Process, Processes},
};

use super::{Bone, Inconsistency, RebuildError, Skeleton};
use crate::{
    files::Rebuilt,
    sys::{descriptor, vm},
};

/// A heap is searched up to this size, in bytes. Those of service managers have a few MiB.
const HEAP_MAX: u64 = 64 << 20;
/// So much is looked at in one go, in bytes.
const PIECE: u64 = 1 << 20;
/// Descriptor and inode.
const ENTRY: usize = 12;

/// The number that the pidfd at a descriptor had, and the one that it has now.
type Renewals = BTreeMap<i32, (u64, u64)>;

impl Skeleton {
    /// Renews the inode numbers of pidfds in the heaps of their holders. The descriptors are
    /// installed, and all pages are there.
    pub fn renew_identities(
        &self,
        processes: &Processes,
        captured: &Files,
        tables: &BTreeMap<i32, Vec<Descriptor>>,
        rebuilt: &Rebuilt,
    ) -> Result<(), RebuildError> {
        let mut renewed = BTreeMap::new();
        for (number, file) in captured.files.iter().enumerate() {
            if let Kind::Process { inode: before @ 1.., .. } = file.kind {
                let id = FileId(number as u32);
                let fd = rebuilt.descriptor(id).ok_or(Inconsistency::UnknownFile(id.0))?;
                let now = descriptor::status(fd).map_err(|source| RebuildError::Outside {
                    pid: 1,
                    what: "look at its pidfds",
                    source,
                })?;
                renewed.insert(id, (before, now.inode));
            }
        }
        if renewed.is_empty() {
            return Ok(());
        }
        for process in &processes.processes {
            let table = tables.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
            let own = table.iter().filter_map(|entry| Some((entry.fd, *renewed.get(&entry.file)?)));
            let own: Renewals = own.collect();
            if !own.is_empty() {
                let bone = self.bone(process.pid)?;
                renew(bone, process, &own).map_err(|source| RebuildError::Outside {
                    pid: process.pid,
                    what: "renew what it remembers of its pidfds",
                    source,
                })?;
            }
        }
        Ok(())
    }
}

fn renew(bone: &Bone, process: &Process, own: &Renewals) -> io::Result<()> {
    let heap = process.memory.start_brk..process.memory.brk;
    if heap.end.saturating_sub(heap.start) > HEAP_MAX {
        tracing::debug!(
            pid = bone.pid,
            "its heap is too large to renew identities of pidfds in it"
        );
        return Ok(());
    }
    for area in &bone.areas {
        let plain = matches!(area.backing, Backing::Anonymous { .. }) && !area.shared;
        if !plain || area.start < heap.start || area.end > heap.end {
            continue;
        }
        let mut at = area.start;
        while at < area.end {
            let len = (area.end - at).min(PIECE);
            // Shorter at what may not be read: nothing is remembered there.
            let bytes = vm::copy_of_process(bone.thread.tid, at, len as usize).unwrap_or_default();
            for (place, inode) in places(&bytes, own) {
                vm::write_process(bone.thread.tid, &inode.to_ne_bytes(), &[(at + place, 8)])?;
            }
            at += len;
        }
    }
    Ok(())
}

/// Where a number is to be renewed, and by which.
fn places(bytes: &[u8], own: &Renewals) -> impl Iterator<Item = (u64, u64)> {
    // Aligned as the compiler aligns the structure; the descriptor is its second half word.
    (4..bytes.len().saturating_sub(ENTRY - 1)).step_by(8).filter_map(|at| {
        let fd = i32::from_ne_bytes(*bytes[at..].first_chunk()?);
        let inode = u64::from_ne_bytes(*bytes[at + 4..].first_chunk()?);
        let &(before, now) = own.get(&fd).filter(|_| inode != 0)?;
        (inode == before).then_some((at as u64 + 4, now))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_number_beside_its_descriptor_is_renewed() {
        let own = Renewals::from([(7, (1000, 2000))]);
        let entry = |pid: i32, fd: i32, inode: u64| {
            [&pid.to_ne_bytes()[..], &fd.to_ne_bytes(), &inode.to_ne_bytes()].concat()
        };
        let bytes = [
            entry(5, 8, 1000),
            entry(5, 7, 1000),
            entry(5, 7, 1001),
            entry(0, 0, 1000),
            entry(6, 7, 1000),
        ]
        .concat();
        assert_eq!(places(&bytes, &own).collect::<Vec<_>>(), [(24, 2000), (72, 2000)]);
        assert_eq!(places(&bytes[..31], &own).count(), 0, "cut off");
        assert_eq!(places(&bytes[..3], &own).count(), 0, "nearly nothing");
    }
}
