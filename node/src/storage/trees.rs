//! Which trees a VE has, and how each side reaches them.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ckpt_engine::{
    container::Tree,
    sys::{clone::open_process, mount::clone_tree, namespace::in_mounts_of},
};
use ckpt_format::container::{Container, FilesystemKind, Mount};
use nix::{
    fcntl::OFlag,
    sys::{
        stat::{Mode, fstat},
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};

use super::{
    apply::TargetTree,
    error::{TreeError, at},
    track::{SourceKind, SourceTree},
    walk::Walk,
};

/// The number of the tree with the VE's own files.
const OWN: u32 = 0;

/// The trees of a running VE: its own files below `upper`, and each tmpfs of the plan, reached
/// through the mounts of the VE's pid 1 `init`.
pub fn source_trees(
    init: i32,
    plan: &Container,
    upper: &Path,
    id_base: u32,
) -> Result<Vec<SourceTree>, TreeError> {
    let opened = nix::fcntl::open(
        upper,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    let upper = opened.map_err(at("open", upper.as_os_str().as_encoded_bytes()))?;
    let points = tmpfs_points(plan)?;
    let process = open_process(init).map_err(at("reach the mounts around", b""))?;
    let clone = || {
        let root = File::open("/")?;
        let view = clone_tree(root.as_fd(), Path::new(""))?;
        let clone = |(_, point): &(u32, &str)| {
            clone_tree(root.as_fd(), Path::new(point.trim_start_matches('/')))
        };
        Ok((view, points.iter().map(clone).collect::<io::Result<Vec<OwnedFd>>>()?))
    };
    let (view, tops) = in_mounts_of(process, clone).map_err(at("reach the mounts around", b""))?;
    let mut trees = vec![SourceTree { number: OWN, kind: SourceKind::Own { upper, view } }];
    let mut devices = HashSet::new();
    for ((number, point), top) in points.into_iter().zip(tops) {
        let status = fstat(&top).map_err(at("look at", point.as_bytes()))?;
        let kind = fstatfs(&top).map_err(at("look at", point.as_bytes()))?.filesystem_type();
        // Another mount on the same place would be found instead of the one that is meant.
        if kind != TMPFS_MAGIC || !devices.insert(status.st_dev) {
            return Err(TreeError::Hidden { point: point.to_owned() });
        }
        trees.push(SourceTree { number, kind: SourceKind::Memory { top, id_base } });
    }
    Ok(trees)
}

/// For each tmpfs a place where all of it is mounted.
fn tmpfs_points(plan: &Container) -> Result<Vec<(u32, &str)>, TreeError> {
    let mut points = Vec::new();
    for (index, filesystem) in plan.filesystems.iter().enumerate() {
        if filesystem.kind != FilesystemKind::Tmpfs {
            continue;
        }
        let Ok(number) = u32::try_from(index) else { continue };
        let of_it = |mount: &&Mount| mount.filesystem == number;
        let covered = |at: usize| {
            let point = &plan.mounts[at].point;
            plan.mounts[at + 1..].iter().any(|later| later.point == *point)
        };
        let whole = plan
            .mounts
            .iter()
            .enumerate()
            .find(|(at, mount)| of_it(mount) && mount.root == "/" && !covered(*at));
        match whole {
            Some((_, mount)) => points.push((number, mount.point.as_str())),
            None => {
                let point = plan.mounts.iter().find(of_it).map(|mount| mount.point.clone());
                return Err(TreeError::Hidden { point: point.unwrap_or_default() });
            }
        }
    }
    Ok(points)
}

/// The trees of a container that waits here for a VE, from those that it came with.
pub fn target_trees(plan: &Container, trees: Vec<Tree>) -> Vec<TargetTree> {
    let root = plan.root_filesystem().unwrap_or(0);
    let points = mount_points(plan);
    let target = |Tree { filesystem, mount: top }: Tree| {
        let mount_points =
            points.iter().filter(|(of, _)| *of == filesystem).map(|(_, place)| place.clone());
        let number = if filesystem == root { Some(OWN) } else { u32::try_from(filesystem).ok() };
        Some(TargetTree { number: number?, top, mount_points: mount_points.collect() })
    };
    trees.into_iter().filter_map(target).collect()
}

/// The places in each file system that something is mounted on, or that are mounted somewhere.
fn mount_points(plan: &Container) -> Vec<(usize, Vec<u8>)> {
    let mut places = Vec::new();
    let mut add = |filesystem: u32, place: &str| {
        let place = place.trim_matches('/');
        if let (Ok(filesystem), false) = (usize::try_from(filesystem), place.is_empty()) {
            places.push((filesystem, place.as_bytes().to_vec()));
        }
    };
    for (index, mount) in plan.mounts.iter().enumerate() {
        add(mount.filesystem, &mount.root);
        let below = |other: &&Mount| inside(&other.point, &mount.point).is_some();
        let parent = plan.mounts[..index].iter().filter(below).max_by_key(|it| it.point.len());
        if let Some(parent) = parent
            && let Some(rest) = inside(&parent.point, &mount.point)
        {
            add(parent.filesystem, &format!("{}/{rest}", parent.root.trim_end_matches('/')));
        }
    }
    places
}

/// The path of `point` from `directory`, if it is in it.
fn inside<'a>(directory: &str, point: &'a str) -> Option<&'a str> {
    let rest = point.strip_prefix(directory.trim_end_matches('/'))?;
    rest.strip_prefix('/').or(Some(rest).filter(|rest| rest.is_empty()))
}

/// How much the VE's files need on the target, in bytes: an estimate for the offer.
pub fn size(trees: &[SourceTree]) -> Result<u64, TreeError> {
    let mut bytes = 0u64;
    for tree in trees {
        bytes += match &tree.kind {
            SourceKind::Own { upper, .. } => {
                let known = |_: &_| true;
                let walk = Walk { top: upper.as_fd(), overlay: true, steady: false, known: &known };
                let scan = walk.run()?;
                let size = |found: &super::walk::Found| found.status.occupied_bytes;
                scan.nodes.values().map(size).sum::<u64>()
            }
            SourceKind::Memory { top, .. } => {
                let status = fstatfs(top).map_err(at("look at", b""))?;
                let used = status.blocks().saturating_sub(status.blocks_free());
                used.saturating_mul(u64::try_from(status.block_size()).unwrap_or(1))
            }
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_in_the_file_system_below() {
        let plan = Container::fresh("ve");
        let named = |kind: &str| {
            let mount = plan.mounts.iter().find(|mount| mount.point == kind).expect("mounted");
            usize::try_from(mount.filesystem).unwrap()
        };
        let places = mount_points(&plan);
        let has = |filesystem: usize, place: &str| {
            places.contains(&(filesystem, place.as_bytes().to_vec()))
        };
        assert!(has(0, "proc") && has(0, "dev") && has(0, "run"));
        assert!(has(named("/dev"), "null") && has(named("/dev"), "shm"));
        assert!(has(named("/run"), "lock"));
        assert!(!has(0, "dev/null") && !has(0, ""));
    }

    #[test]
    fn a_tmpfs_under_another_mount_is_refused() {
        let mut plan = Container::fresh("ve");
        assert_eq!(tmpfs_points(&plan).unwrap().len(), 4);
        let run = plan.mounts.iter().find(|mount| mount.point == "/run").cloned().unwrap();
        plan.mounts.push(Mount { filesystem: 0, ..run });
        assert!(matches!(tmpfs_points(&plan), Err(TreeError::Hidden { point }) if point == "/run"));
    }
}
