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
    sys::{
        mount::clone_tree,
        namespace::{in_copy_of, in_mounts_of},
    },
};
use ckpt_format::container::{Container, Mount, Part, covers, inside, parts};
use nix::{
    fcntl::OFlag,
    mount::{MntFlags, umount2},
    sys::{
        stat::{Mode, fstat},
        statfs::{FsType, TMPFS_MAGIC, fstatfs},
    },
};

use super::{
    apply::TargetTree,
    error::{TreeError, at},
    status::Recall,
    track::{SourceKind, SourceTree},
    walk::Walk,
};

const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The number of the tree with the VE's own files.
const OWN: u32 = 0;

/// The trees of a running VE: its own files below `upper`, and all files in memory that the plan
/// shows, reached through the mount namespaces that the plan was read in.
pub fn source_trees(
    mounts: &[OwnedFd],
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
    let hidden = |point: &str| TreeError::Hidden { point: point.to_owned() };
    let wanted = parts(plan).map_err(hidden)?;
    let mut tops: Vec<Option<OwnedFd>> = wanted.iter().map(|_| None).collect();
    let mut view = None;
    for (number, namespace) in mounts.iter().enumerate() {
        let here: Vec<usize> =
            (0..wanted.len()).filter(|&it| wanted[it].mount.0 == number).collect();
        let known = view.is_some();
        let found = || {
            let root = File::open("/")?;
            // That of the VE's own is enough. Without what is mounted there, the root of a namespace
            // that belongs to a user namespace cannot be cloned.
            let view = match known {
                true => None,
                false => Some(clone_tree(root.as_fd(), Path::new(""))?),
            };
            let clone = |&index: &usize| clone_part(&root, plan, &wanted[index]);
            Ok((view, here.iter().map(clone).collect::<io::Result<Vec<Option<OwnedFd>>>>()?))
        };
        let found = in_mounts_of(namespace, found).map_err(|source| match source.kind() {
            // A service that has just ended has taken its mounts away.
            io::ErrorKind::NotFound => hidden("/"),
            _ => at("reach the mounts around", b"")(source),
        })?;
        view = view.or(found.0);
        for (index, top) in here.into_iter().zip(found.1) {
            tops[index] = top;
        }
    }
    uncover(mounts, plan, &wanted, &mut tops)?;
    let view = view.ok_or_else(|| hidden("/"))?;
    let mut trees = vec![SourceTree { number: OWN, kind: SourceKind::Own { upper, view } }];
    let mut seen = HashSet::new();
    for (index, (part, top)) in wanted.iter().zip(tops).enumerate() {
        let point = point_of(plan, part);
        let top = top.ok_or_else(|| hidden(point))?;
        let status = fstat(&top).map_err(at("look at", point.as_bytes()))?;
        let kind = fstatfs(&top).map_err(at("look at", point.as_bytes()))?.filesystem_type();
        // Another mount on the same place would be found instead of the one that is meant.
        let memory = [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind);
        if !memory || !seen.insert((status.st_dev, status.st_ino)) {
            return Err(hidden(point));
        }
        let number = number(index);
        trees.push(SourceTree { number, kind: SourceKind::Memory { top, id_base } });
    }
    Ok(trees)
}

/// The number of the tree with a part of the files in memory.
fn number(part: usize) -> u32 {
    u32::try_from(part + 1).unwrap_or(u32::MAX)
}

fn mount_of<'a>(plan: &'a Container, part: &Part<'_>) -> (&'a [Mount], &'a Mount) {
    let table = plan.mount_tables().nth(part.mount.0).unwrap_or_default();
    (table, &table[part.mount.1])
}

fn point_of<'a>(plan: &'a Container, part: &Part<'_>) -> &'a str {
    &mount_of(plan, part).1.point
}

/// A detached mount of a part, for a thread whose tree shows it; `None` if something hides it.
fn clone_part(root: &File, plan: &Container, part: &Part<'_>) -> io::Result<Option<OwnedFd>> {
    let (table, mount) = mount_of(plan, part);
    if !covers(table, part.mount.1).is_empty() {
        return Ok(None);
    }
    let path = Path::new(mount.point.trim_start_matches('/'));
    let place = u32::try_from(part.mount.1);
    if mount.unbindable && !table.iter().skip(1).any(|other| Ok(other.parent) == place) {
        // It cannot be cloned, but it shows all of itself, too.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        return Ok(Some(nix::fcntl::openat(root, path, flags, Mode::empty())?));
    }
    clone_tree(root.as_fd(), path).map(Some)
}

/// Finds the parts that other mounts hide: in a copy of the namespace, which nobody else sees and
/// which goes with the thread, what hides them is taken away.
fn uncover(
    mounts: &[OwnedFd],
    plan: &Container,
    wanted: &[Part<'_>],
    tops: &mut [Option<OwnedFd>],
) -> Result<(), TreeError> {
    for (part, top) in wanted.iter().zip(tops).filter(|(_, top)| top.is_none()) {
        let (table, mount) = mount_of(plan, part);
        let Some(namespace) = mounts.get(part.mount.0) else { continue };
        let found = in_copy_of(namespace, || {
            for cover in covers(table, part.mount.1) {
                let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
                umount2(cover.point.as_str(), flags)?;
            }
            clone_tree(File::open("/")?.as_fd(), Path::new(mount.point.trim_start_matches('/')))
        });
        *top = Some(found.map_err(at("reach what is hidden on", mount.point.as_bytes()))?);
    }
    Ok(())
}

/// The trees of a container that waits here for a VE, from those that it came with.
pub fn target_trees(plan: &Container, trees: Vec<Tree>) -> Vec<TargetTree> {
    let points = mount_points(plan);
    let wanted = parts(plan).unwrap_or_default();
    let target = |Tree { filesystem, part, mount: top }: Tree| {
        let root = part.and_then(|part| wanted.get(part)).map_or("/", |part| part.root);
        let below = |(of, place): &(usize, Vec<u8>)| {
            let place = std::str::from_utf8(place).ok().filter(|_| *of == filesystem)?;
            let rest = inside(root, place)?;
            (!rest.is_empty()).then(|| rest.as_bytes().to_vec())
        };
        let mount_points = points.iter().filter_map(below).collect();
        let read_only = part.is_some()
            && plan.filesystems[filesystem].options.iter().any(|option| option.name == "ro");
        TargetTree { number: part.map_or(OWN, number), top, mount_points, read_only }
    };
    trees.into_iter().map(target).collect()
}

/// The places in each file system that something is mounted on, or that are mounted somewhere.
fn mount_points(plan: &Container) -> Vec<(usize, Vec<u8>)> {
    let mut places = Vec::new();
    let mut add = |filesystem: u32, place: &str| {
        let place = place.trim_end_matches('/');
        if let (Ok(filesystem), false) = (usize::try_from(filesystem), place.is_empty()) {
            places.push((filesystem, place.as_bytes().to_vec()));
        }
    };
    for table in plan.mount_tables() {
        for mount in table {
            add(mount.filesystem, &mount.root);
            let parent = usize::try_from(mount.parent).ok().and_then(|parent| table.get(parent));
            if let Some(parent) = parent
                && let Some(rest) = inside(&parent.point, &mount.point)
            {
                add(parent.filesystem, &format!("{}/{rest}", parent.root.trim_end_matches('/')));
            }
        }
    }
    places.sort_unstable();
    places.dedup();
    places
}

/// How much the VE's files need on the target, in bytes: an estimate for the offer.
pub fn size(trees: &[SourceTree]) -> Result<u64, TreeError> {
    let mut bytes = 0u64;
    for tree in trees {
        bytes += match &tree.kind {
            SourceKind::Own { upper, .. } => {
                let known = |_: &_| true;
                let walk = Walk {
                    top: upper.as_fd(),
                    overlay: true,
                    steady: false,
                    known: &known,
                    recall: Recall::default(),
                };
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
            places.contains(&(filesystem, format!("/{place}").into_bytes()))
        };
        assert!(has(0, "proc") && has(0, "dev") && has(0, "run"));
        assert!(has(named("/dev"), "null") && has(named("/dev"), "shm"));
        assert!(has(named("/run"), "lock"));
        assert!(!has(0, "dev/null") && !has(0, ""));
    }
}
