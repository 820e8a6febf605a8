//! What the target has of a tree, and the steps from there to what was found on the source.
//!
//! Pure: files are followed by their identity, so that a renamed or linked file is known again,
//! whatever else has changed names around it. What must leave its place is taken out first, from
//! the deepest directory upwards, and parked if it is still wanted; then everything gets its
//! place, from the top downwards. So a path in a step is always right at its moment, also when
//! files or directories have exchanged names.

use std::collections::{BTreeMap, HashMap, HashSet};

use ckpt_format::tree::{Attributes, Node, Step};

use super::{
    contents::Blocks,
    path,
    status::{Identity, Stamp},
    walk::{Detail, Entry, Name, Scan},
};

/// A file that has vanished during a round is kept for one more round from this size on, in
/// bytes: it may only have changed its name while its directory was being read.
const PARKED_SIZE_MIN: u64 = 1 << 20;

/// A tree as the target has it.
#[derive(Debug)]
pub(super) struct Mirror {
    top: Identity,
    nodes: HashMap<Identity, Copy>,
    parked_last: u64,
}

/// One file as the target has it.
#[derive(Debug, Default)]
pub(super) struct Copy {
    /// Its names: the directory and the name there. The first one is used.
    names: Vec<(Identity, Name)>,
    parked: Option<u64>,
    children: BTreeMap<Name, Entry>,
    pub(super) sent: Sent,
}

/// What has been sent of one file.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// What stat(2) said before the file was read the last time; `None` if not all was read.
    pub(super) stamp: Option<Stamp>,
    pub(super) attributes: Option<Attributes>,
    pub(super) blocks: Blocks,
    /// It may have changed while it was read, without a trace in the stamp.
    pub(super) doubtful: bool,
    /// Its device and inode number as the VE sees them.
    pub(super) seen_as: Option<(u64, u64)>,
}

/// A directory in an order of parents before children, with its path and its files.
pub(super) struct Directory {
    pub(super) identity: Identity,
    pub(super) path: Vec<u8>,
    /// Each file that is no directory once, under the first of its names.
    pub(super) files: Vec<(Name, Identity)>,
}

type Emit<'a, E> = &'a mut dyn FnMut(Step) -> Result<(), E>;

impl Mirror {
    /// What the target has before anything was sent.
    pub(super) fn new(top: Identity) -> Self {
        let nodes = HashMap::from([(top, Copy::default())]);
        Self { top, nodes, parked_last: 0 }
    }

    pub(super) fn knows(&self, identity: &Identity) -> bool {
        self.nodes.contains_key(identity)
    }

    /// Files whose stamp is so old that every later change shows in it: as old as a moment, in
    /// seconds.
    pub(super) fn unchanged_since(
        &self,
        moment: i64,
    ) -> impl Iterator<Item = (Identity, Stamp)> + '_ {
        self.nodes.iter().filter_map(move |(identity, copy)| {
            let stamp = copy.sent.stamp.filter(|stamp| stamp.changed.seconds < moment)?;
            Some((*identity, stamp))
        })
    }

    /// Whether the target keeps something that has no name just now.
    pub(super) fn has_parked(&self) -> bool {
        self.nodes.values().any(|copy| copy.parked.is_some())
    }

    pub(super) fn sent(&mut self, identity: &Identity) -> Option<&mut Sent> {
        self.nodes.get_mut(identity).map(|copy| &mut copy.sent)
    }

    /// Whether it is the same tree: its top never changes.
    pub(super) fn top(&self) -> Identity {
        self.top
    }

    /// Makes the names on the target those of the scan. Returns the directories whose entries
    /// were changed by that. In the `last` round nothing stays parked.
    pub(super) fn follow<E>(
        &mut self,
        scan: &Scan,
        last: bool,
        emit: Emit<'_, E>,
    ) -> Result<HashSet<Identity>, E> {
        let mut touched = HashSet::new();
        let waiting: Vec<Identity> = self
            .nodes
            .iter()
            .filter(|(_, copy)| copy.parked.is_some())
            .map(|(identity, _)| *identity)
            .collect();
        self.take_out(scan, last, &mut touched, emit)?;
        // What was missing in the last round and is missing still has really gone.
        for identity in waiting {
            if !scan.nodes.contains_key(&identity)
                && let Some(number) = self.nodes.remove(&identity).and_then(|copy| copy.parked)
            {
                emit(Step::Discard { number })?;
            }
        }
        let links = self.put_in(scan, &mut touched, emit)?;
        for (directory, name, identity) in links {
            let existing = self.path(&identity);
            let path = path::join(&self.path(&directory), &name);
            emit(Step::Link { existing, path })?;
            self.name(identity, directory, name);
        }
        Ok(touched)
    }

    /// The path of a file by the first of its names.
    pub(super) fn path(&self, identity: &Identity) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = identity;
        while let Some((parent, name)) = self.nodes.get(at).and_then(|copy| copy.names.first()) {
            names.push(name.as_slice());
            at = parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// All directories with their files, parents first.
    pub(super) fn directories(&self) -> Vec<Directory> {
        let mut found = Vec::new();
        let mut pending = vec![(self.top, Vec::new())];
        while let Some((identity, path)) = pending.pop() {
            let mut files = Vec::new();
            let children = self.nodes.get(&identity).map(|copy| &copy.children);
            for (name, entry) in children.into_iter().flatten() {
                let Entry::Node(child) = entry else { continue };
                if child.kind == libc::S_IFDIR {
                    pending.push((*child, path::join(&path, name)));
                } else if self.nodes.get(child).and_then(|copy| copy.names.first())
                    == Some(&(identity, name.clone()))
                {
                    files.push((name.clone(), *child));
                }
            }
            found.push(Directory { identity, path, files });
        }
        found
    }

    fn take_out<E>(
        &mut self,
        scan: &Scan,
        last: bool,
        touched: &mut HashSet<Identity>,
        emit: Emit<'_, E>,
    ) -> Result<(), E> {
        for directory in self.directories().into_iter().rev() {
            let now = scan.nodes.get(&directory.identity).map(|found| &found.children);
            let Some(copy) = self.nodes.get(&directory.identity) else { continue };
            let leaving: Vec<(Name, Entry)> = copy
                .children
                .iter()
                .filter(|(name, entry)| now.and_then(|now| now.get(*name)) != Some(*entry))
                .map(|(name, entry)| (name.clone(), *entry))
                .collect();
            for (name, entry) in leaving {
                if let Some(copy) = self.nodes.get_mut(&directory.identity) {
                    copy.children.remove(&name);
                }
                if now.is_some() {
                    touched.insert(directory.identity);
                }
                let Entry::Node(child) = entry else { continue };
                let path = path::join(&directory.path, &name);
                let wanted = scan.nodes.contains_key(&child);
                emit(self.take_name(child, (directory.identity, name), path, wanted, last))?;
            }
        }
        Ok(())
    }

    /// Takes one name from a file: the step that does so.
    fn take_name(
        &mut self,
        identity: Identity,
        name: (Identity, Name),
        path: Vec<u8>,
        wanted: bool,
        last: bool,
    ) -> Step {
        let Some(copy) = self.nodes.get_mut(&identity) else { return Step::Remove { path } };
        copy.names.retain(|other| *other != name);
        if !copy.names.is_empty() {
            return Step::Remove { path };
        }
        let large = copy.sent.blocks.size() >= PARKED_SIZE_MIN;
        if !wanted && (last || !large || identity.kind != libc::S_IFREG) {
            self.nodes.remove(&identity);
            return Step::Remove { path };
        }
        self.parked_last += 1;
        copy.parked = Some(self.parked_last);
        Step::Park { path, number: self.parked_last }
    }

    /// Gives everything its place, and tells which second names remain to be made: what they
    /// are names of may get its own place only later.
    fn put_in<E>(
        &mut self,
        scan: &Scan,
        touched: &mut HashSet<Identity>,
        emit: Emit<'_, E>,
    ) -> Result<Vec<(Identity, Name, Identity)>, E> {
        let mut links = Vec::new();
        let mut pending = vec![(self.top, Vec::new())];
        while let Some((directory, here)) = pending.pop() {
            let Some(found) = scan.nodes.get(&directory) else { continue };
            for (name, entry) in &found.children {
                let known = self.nodes.get(&directory).and_then(|copy| copy.children.get(name));
                let path = path::join(&here, name);
                if known != Some(entry) {
                    touched.insert(directory);
                    match entry {
                        Entry::Whiteout => {
                            emit(Step::Remove { path: path.clone() })?;
                            if let Some(copy) = self.nodes.get_mut(&directory) {
                                copy.children.insert(name.clone(), Entry::Whiteout);
                            }
                        }
                        Entry::Node(child) => {
                            match self.place(scan, *child, path.clone()) {
                                Some(step) => {
                                    emit(step)?;
                                    self.name(*child, directory, name.clone());
                                }
                                None => links.push((directory, name.clone(), *child)),
                            };
                        }
                    }
                }
                if let Entry::Node(child) = entry
                    && child.kind == libc::S_IFDIR
                {
                    pending.push((*child, path));
                }
            }
        }
        Ok(links)
    }

    /// The step that gives a file its first name; `None` when it has one.
    fn place(&mut self, scan: &Scan, identity: Identity, path: Vec<u8>) -> Option<Step> {
        if let Some(copy) = self.nodes.get_mut(&identity) {
            return copy.parked.take().map(|number| Step::Place { number, path });
        }
        let found = scan.nodes.get(&identity)?;
        self.nodes.insert(identity, Copy::default());
        let device = |block| Node::Device {
            block,
            major: major(found.status.rdev),
            minor: minor(found.status.rdev),
        };
        let node = match (identity.kind, &found.detail) {
            (libc::S_IFDIR, Detail::Directory { opaque }) => Node::Directory { opaque: *opaque },
            (libc::S_IFLNK, Detail::Symlink { target }) => Node::Symlink { target: target.clone() },
            (libc::S_IFIFO, _) => Node::Fifo,
            (libc::S_IFSOCK, _) => Node::Socket,
            (libc::S_IFCHR, _) => device(false),
            (libc::S_IFBLK, _) => device(true),
            _ => Node::File,
        };
        Some(Step::Make { path, node })
    }

    fn name(&mut self, identity: Identity, directory: Identity, name: Name) {
        if let Some(copy) = self.nodes.get_mut(&identity) {
            copy.names.push((directory, name.clone()));
        }
        if let Some(copy) = self.nodes.get_mut(&directory) {
            copy.children.insert(name, Entry::Node(identity));
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "device numbers have 32 bits")]
fn major(device: u64) -> u32 {
    nix::sys::stat::major(device) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "device numbers have 32 bits")]
fn minor(device: u64) -> u32 {
    nix::sys::stat::minor(device) as u32
}
