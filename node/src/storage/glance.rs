//! Looks whether a tree that stands still has the names that it had.
//!
//! What is created, removed or renamed in a directory changes its times, which no program can set
//! back. If every directory has the times that it had, and they are old enough for a later change
//! to show, then every name is there still, and no directory need be read: each file is only asked
//! for what stat(2) tells.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use super::{
    mirror::{Directory, Mirror},
    path,
    status::{self, Identity, Recall, Status},
    walk::{Detail, Scan, found},
};

/// The files of a tree that stands still, if their names are those of the mirror. Without the
/// entries of directories: the mirror has them.
pub(super) fn glance(
    top: BorrowedFd<'_>,
    mirror: &Mirror,
    directories: &[Directory],
    recall: &Recall,
) -> Option<Scan> {
    if mirror.has_parked() || !directories.iter().all(|it| recall.knows(&it.identity)) {
        return None;
    }
    let mut scan = Scan { top: mirror.top(), nodes: HashMap::new() };
    let mut see = |identity: &Identity, (seen, status): (Identity, Status)| {
        scan.nodes.insert(seen, found(status, Detail::Plain));
        (seen == *identity).then_some(())
    };
    for directory in directories {
        let opened = path::open_directory(top, &directory.path).ok()?;
        let (seen, status) = status::of_open_known(opened.as_fd(), recall).ok()?;
        if !recall.is_same(&seen, &status) {
            return None;
        }
        see(&directory.identity, (seen, status))?;
        for (name, identity) in &directory.files {
            let looked = status::of_steady_entry(opened.as_fd(), name, recall).ok()?;
            see(identity, looked)?;
        }
    }
    Some(scan)
}
