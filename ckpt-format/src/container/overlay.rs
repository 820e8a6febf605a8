//! Overlays that programs have made, and mounts that can be made only when all else is there.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{Container, FilesystemKind, Mount, inside};

/// How the paths in the options of an overlay lead to its layers: as they did when it was mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Among the mounts of which namespace, as counted by [`Container::mount_tables`].
    pub table: u32,
    /// What has to be unmounted before, in this order. Other overlays are not there then.
    pub covers: Vec<String>,
    /// The overlays that layers of it are in, as places in [`Container::filesystems`]: these are
    /// there.
    pub on: Vec<u32>,
}

/// Whether a mount shows a file system that has to wait: the `/proc` of a pid namespace below the
/// container's own can be made only when that has a process, an overlay only when its layers have
/// all their files.
#[must_use]
pub fn made_late(plan: &Container, mount: &Mount) -> bool {
    let place = usize::try_from(mount.filesystem).ok();
    let shown = place.and_then(|place| plan.filesystems.get(place));
    shown.is_some_and(|shown| match shown.kind {
        FilesystemKind::Proc => shown.pids != 0,
        FilesystemKind::Overlay(_) => true,
        _ => false,
    })
}

/// Which mounts of a namespace have to wait: those that [show](made_late) what has to, and what
/// stands on them.
#[must_use]
pub fn late(plan: &Container, mounts: &[Mount]) -> Vec<bool> {
    let mut late = vec![false; mounts.len()];
    for (place, mount) in mounts.iter().enumerate().skip(1) {
        let parent = usize::try_from(mount.parent).ok().filter(|&parent| parent < place);
        late[place] = made_late(plan, mount) || parent.is_some_and(|parent| late[parent]);
    }
    late
}

/// The mounts of each namespace, and which of them have to wait. Empty if none has.
#[derive(Clone, Debug, Default)]
pub struct Waiting(Vec<(Vec<Mount>, Vec<bool>)>);

impl Waiting {
    /// Those of a plan.
    #[must_use]
    pub fn of(plan: &Container) -> Self {
        let tables = plan.mount_tables().map(|mounts| (mounts.to_vec(), late(plan, mounts)));
        let tables: Vec<_> = tables.collect();
        let any = tables.iter().any(|(_, late)| late.contains(&true));
        Self(if any { tables } else { Vec::new() })
    }

    /// True if what a path without links leads to comes with a mount that has to wait.
    /// `namespace` is counted as by [`Container::mount_tables`]; `None` stands for each of them.
    #[must_use]
    pub fn holds(&self, namespace: Option<u32>, path: &str) -> bool {
        let asked = |number: usize| namespace.is_none_or(|it| usize::try_from(it) == Ok(number));
        let mut tables = self.0.iter().enumerate().filter(|(number, _)| asked(*number));
        tables.any(|(_, (mounts, late))| late.get(seen(mounts, path)).copied().unwrap_or(false))
    }
}

/// The mount that a path without links leads into.
fn seen(mounts: &[Mount], path: &str) -> usize {
    let mut at = 0;
    // The first one stands on itself, and a damaged list could be a circle.
    let mut been = HashSet::from([0]);
    loop {
        let stands = |mount: &Mount| usize::try_from(mount.parent) == Ok(at);
        let above = mounts.iter().enumerate().filter(|(place, mount)| {
            stands(mount) && !been.contains(place) && inside(&mount.point, path).is_some()
        });
        // Of those on one mount the highest hides the others.
        let Some((next, _)) = above.min_by_key(|(_, mount)| mount.point.len()) else { return at };
        been.insert(next);
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_an_overlay_waits_and_what_is_beside_it_does_not() {
        let mut plan = Container::fresh("ve");
        assert!(!Waiting::of(&plan).holds(None, "/run/x"));
        let number = u32::try_from(plan.filesystems.len()).unwrap();
        let like = plan.filesystems[0].clone();
        let kind = FilesystemKind::Overlay(Overlay::default());
        plan.filesystems.push(super::super::Filesystem { kind, ..like });
        let run = plan.mounts.iter().position(|mount| mount.point == "/run").unwrap();
        let add = |plan: &mut Container, point: &str, parent: usize, filesystem: u32| {
            let parent = u32::try_from(parent).unwrap();
            let like = plan.mounts[0].clone();
            plan.mounts.push(Mount { point: point.to_owned(), parent, filesystem, ..like });
            plan.mounts.len() - 1
        };
        let etc = add(&mut plan, "/etc", 0, number);
        let tmpfs = plan.mounts[run].filesystem;
        add(&mut plan, "/etc/inner", etc, tmpfs);
        let hidden = add(&mut plan, "/run/a/b", run, number);
        add(&mut plan, "/run/a", run, tmpfs);
        let late = late(&plan, &plan.mounts);
        assert!(late[etc] && late[etc + 1] && late[hidden] && !late[hidden + 1] && !late[run]);
        let waiting = Waiting::of(&plan);
        for (path, waits) in [
            ("/etc/passwd", true),
            ("/etc", true),
            ("/etcetera", false),
            ("/etc/inner/file", true),
            ("/run/a/b/c", false),
            ("/usr/lib", false),
        ] {
            assert_eq!(waiting.holds(Some(0), path), waits, "{path}");
            assert_eq!(waiting.holds(None, path), waits, "{path}");
            assert!(!waiting.holds(Some(1), path));
        }
    }
}
