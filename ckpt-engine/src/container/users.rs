//! User namespaces below the container's own: who is who in them, and which other namespaces
//! are theirs.
//!
//! Made by pid 1 of the container, through processes that live for a moment: what a process has
//! once joined it cannot leave.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use ckpt_format::container::{IdRange, Users};
use nix::{
    sys::prctl,
    unistd::{Uid, setresuid},
};

use super::{ID_COUNT, nested::Own, read_proc};
use crate::sys::{
    namespace::{join, keep_capabilities, unshare},
    users,
};

/// User namespaces of a running container.
#[derive(Debug, Default)]
pub(super) struct UserSpaces {
    /// The container's own first, each after its parent.
    all: Vec<OwnedFd>,
    numbers: HashMap<u64, u32>,
    parents: Vec<u32>,
}

impl UserSpaces {
    /// The number of a user namespace, which is added, with those above it, if it is new. The
    /// first one is the container's own.
    pub(super) fn add(&mut self, namespace: OwnedFd) -> io::Result<u32> {
        let inode = inode_of(namespace.as_fd())?;
        if let Some(&known) = self.numbers.get(&inode) {
            return Ok(known);
        }
        let parent = match self.all.is_empty() {
            true => 0,
            // Nothing inside has a namespace that is not below the container's own.
            false => self.add(users::parent(namespace.as_fd())?)?,
        };
        let number = u32::try_from(self.all.len()).map_err(io::Error::other)?;
        self.numbers.insert(inode, number);
        self.all.push(namespace);
        self.parents.push(parent);
        Ok(number)
    }

    /// The number of the one that a namespace of another kind belongs to.
    pub(super) fn owner(&mut self, namespace: BorrowedFd<'_>) -> io::Result<u32> {
        self.add(users::owner(namespace)?)
    }

    pub(super) fn number(&self, inode: u64) -> Option<u32> {
        self.numbers.get(&inode).copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = (u64, u32)> {
        self.numbers.iter().map(|(&inode, &number)| (inode, number))
    }

    /// Whether a user namespace is the container's own or one below it.
    pub(super) fn is_below(&self, namespace: BorrowedFd<'_>) -> io::Result<bool> {
        let mut at = namespace.try_clone_to_owned()?;
        loop {
            if self.numbers.contains_key(&inode_of(at.as_fd())?) {
                return Ok(true);
            }
            at = match users::parent(at.as_fd()) {
                Ok(parent) => parent,
                // Above all that we see.
                Err(_) => return Ok(false),
            };
        }
    }

    pub(super) fn get(&self, number: u32) -> Option<&OwnedFd> {
        self.all.get(usize::try_from(number).ok()?)
    }

    /// What is needed to make them again.
    pub(super) fn describe(&self, base: u32) -> io::Result<Vec<Users>> {
        let mut maps = vec![[container_map(base), container_map(base)]];
        let mut found = Vec::new();
        for (place, namespace) in self.all.iter().enumerate().skip(1) {
            let visitor = users::visit(namespace.as_fd())?;
            let read = |name: &str| read_proc(&format!("/proc/{}/{name}", visitor.pid()));
            let own = [ranges(&read("uid_map")?), ranges(&read("gid_map")?)];
            let parent = self.parents[place];
            let above = &maps[usize::try_from(parent).map_err(io::Error::other)?];
            let owner =
                IdRange { inside: 0, outside: users::creator(namespace.as_fd())?, count: 1 };
            let owner = seen_from(&above[0], owner).map(|owner| owner.outside);
            let seen = |kind: usize| {
                own[kind].iter().map(|range| seen_from(&above[kind], *range)).collect::<Option<_>>()
            };
            let told = (owner, seen(0), seen(1));
            let (Some(owner), Some(users), Some(groups)) = told else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let groups_fixed = read("setgroups")?.trim() == "deny";
            found.push(Users { parent, owner, users, groups, groups_fixed });
            maps.push(own);
        }
        Ok(found)
    }
}

pub(super) fn inode_of(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(namespace.try_clone_to_owned()?).metadata()?.ino())
}

fn container_map(base: u32) -> Vec<IdRange> {
    vec![IdRange { inside: 0, outside: base, count: ID_COUNT }]
}

/// A map of ids, as read from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdRanges(Vec<IdRange>);

impl IdRanges {
    pub(crate) fn read(map: &str) -> Self {
        Self(ranges(map))
    }

    /// What an id of the host is inside.
    pub(crate) fn inside(&self, host: u32) -> Option<u32> {
        seen_from(&self.0, IdRange { inside: 0, outside: host, count: 1 }).map(|it| it.outside)
    }
}

/// The ranges of a map, as read from the host: what they stand for is the host's ids.
fn ranges(map: &str) -> Vec<IdRange> {
    let range = |line: &str| {
        let mut words = line.split_whitespace().map(|word| word.parse().ok());
        let mut next = || words.next().flatten();
        Some(IdRange { inside: next()?, outside: next()?, count: next()? })
    };
    map.lines().filter_map(range).collect()
}

/// A range of the host's ids as a namespace with this map numbers them.
fn seen_from(map: &[IdRange], range: IdRange) -> Option<IdRange> {
    map.iter().find_map(|above| {
        let offset = range.outside.checked_sub(above.outside)?;
        let fits = offset.checked_add(range.count)? <= above.count;
        fits.then_some(IdRange { outside: above.inside.checked_add(offset)?, ..range })
    })
}

/// Makes all of them.
pub(super) fn make(wanted: &[Users], own: &Own) -> io::Result<Vec<OwnedFd>> {
    let mut made: Vec<OwnedFd> = Vec::new();
    for wanted in wanted {
        let parent = match usize::try_from(wanted.parent).map_err(io::Error::other)? {
            0 => None,
            number => Some(made.get(number - 1).ok_or(io::ErrorKind::InvalidData)?),
        };
        // Whoever writes the map has to be in the parent.
        let helper = own.helper(|| {
            if let Some(parent) = parent {
                join(parent.as_fd(), libc::CLONE_NEWUSER)?;
                prctl::set_dumpable(true)?;
            }
            let first = own.helper(|| found(wanted))?;
            write_map(wanted, first.host, own)?;
            let namespace = own.open_of(first.host, "user")?;
            drop(first);
            join(namespace.as_fd(), libc::CLONE_NEWUSER)?;
            prctl::set_dumpable(true).map_err(io::Error::from)
        })?;
        made.push(own.open_of(helper.host, "user")?);
    }
    Ok(made)
}

/// The caller leaves for a new user namespace, as its owner.
fn found(wanted: &Users) -> io::Result<()> {
    if wanted.owner != 0 {
        keep_capabilities()?;
        let owner = Uid::from_raw(wanted.owner);
        setresuid(owner, owner, owner)?;
        // Others could not write its map.
        prctl::set_dumpable(true)?;
    }
    unshare(libc::CLONE_NEWUSER)
}

fn write_map(wanted: &Users, host: i32, own: &Own) -> io::Result<()> {
    if wanted.groups_fixed {
        own.write(host, "setgroups", "deny")?;
    }
    for (name, map) in [("uid_map", &wanted.users), ("gid_map", &wanted.groups)] {
        let line =
            |range: &IdRange| format!("{} {} {}\n", range.inside, range.outside, range.count);
        let text: String = map.iter().map(line).collect();
        if !text.is_empty() {
            own.write(host, name, &text)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_the_host_become_those_of_the_parent() {
        let map = ranges("         0     100000      65536\n");
        let range = |inside, outside, count| IdRange { inside, outside, count };
        assert_eq!(seen_from(&map, range(0, 101_000, 1)), Some(range(0, 1000, 1)));
        assert_eq!(seen_from(&map, range(0, 100_000, 65_536)), Some(range(0, 0, 65_536)));
        assert_eq!(seen_from(&map, range(0, 100_001, 65_536)), None);
        assert_eq!(seen_from(&map, range(0, 5, 1)), None);
    }
}
