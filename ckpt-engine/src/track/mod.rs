//! Pre-copy: sends the memory of a running VE in rounds, each what was written since the last.
//!
//! Writes are tracked by userfaultfd's asynchronous write protection and found by
//! `PAGEMAP_SCAN`: the kernel resolves the faults by itself, so a dead daemon never blocks the
//! VE. What tracking cannot see is listed here, and is always treated as written:
//!
//! - new and moved areas (not registered yet), new processes, and programs just executed;
//! - shared memory, which any holder of a descriptor can write: compared by content;
//! - pages that could not be read when they were due.
//!
//! What vanished is told by [`Record::Drop`], so that the target never keeps stale pages.

mod direct;
mod error;
mod list;
mod output;
mod process;
mod repeats;
mod segments;
mod shared;
mod sharing;

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ckpt_format::{
    memory::SharedObject,
    process::{Layout, Processes, Shape},
    stream::Record,
};

pub use self::{
    error::TrackError,
    process::Tracked,
    repeats::{Look, Repeats, SAMPLE, Shortened},
};
use self::{
    list::{DYING, Known, Seen, in_tree_order},
    output::Output,
    shared::TrackedObject,
};
use crate::{
    container::Spaces,
    kin::{self, Kin},
    rebuild::Later,
    surgeon::{Mark, Surgeon},
};

/// Where records go. `Err` means that nobody takes them any more.
pub trait Sink {
    /// Takes one record; may block, so that memory stays bounded.
    fn record(&mut self, record: Record) -> Result<(), SinkClosed>;
}

/// The receiving side of a [`Sink`] is gone.
#[derive(Debug)]
pub struct SinkClosed;

impl<F: FnMut(Record) -> Result<(), SinkClosed>> Sink for F {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self(record)
    }
}

/// What one round sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pages with contents.
    pub pages: u64,
    /// Pages that hold zeros or have vanished.
    pub dropped: u64,
    /// Processes seen.
    pub processes: usize,
    /// Pages of it that could come when the VE runs on the target already.
    pub plain: u64,
}

/// Tracks the memory of one VE.
#[derive(Debug)]
pub struct Tracker {
    cgroup: PathBuf,
    id_base: u32,
    surgeon: Surgeon,
    processes: BTreeMap<i32, Tracked>,
    known: Known,
    /// The first process, as numbered on the host, once it was seen.
    init: Option<i32>,
    shared: HashMap<u64, TrackedObject>,
    /// Objects that are only open, not mapped.
    open: HashMap<u64, SharedObject>,
    /// Processes that hang outside the tree of the VE's init, as numbered on the host.
    strangers: Vec<i32>,
    /// The relations between the processes that the target has.
    kin: BTreeMap<i32, Kin>,
    lives: u64,
    frozen: bool,
    /// What can come later is kept back.
    leaves: bool,
    /// What the target was told in the last round.
    told: (Vec<Member>, Vec<SharedObject>),
    /// The namespaces of the VE; `None` if all its processes share them.
    spaces: Option<Arc<Spaces>>,
}

impl Tracker {
    /// For the VE whose processes live in `cgroup` (cgroup v2) and whose ids start at `id_base`.
    /// `surgeon` starts the tracking of each process.
    pub fn new(cgroup: &Path, id_base: u32, surgeon: Surgeon) -> Self {
        Self {
            cgroup: cgroup.to_owned(),
            id_base,
            surgeon,
            processes: BTreeMap::new(),
            known: Known::default(),
            init: None,
            shared: HashMap::new(),
            open: HashMap::new(),
            strangers: Vec::new(),
            kin: BTreeMap::new(),
            lives: 0,
            frozen: false,
            leaves: false,
            told: (Vec::new(), Vec::new()),
            spaces: None,
        }
    }

    /// Tells which namespaces there are, so that each process is told with its own.
    #[must_use]
    pub fn with_spaces(self, spaces: Arc<Spaces>) -> Self {
        Self { spaces: Some(spaces), ..self }
    }

    /// Sends what was written since the last round; the first time, everything.
    pub fn round(&mut self, sink: &mut impl Sink) -> Result<Round, TrackError> {
        let members = self.refresh()?;
        let shared = self.refresh_shared(&members)?;
        let mut round = Round { processes: members.len(), ..Round::default() };
        let mut output = Output::new(sink, &mut round);
        let sent = self.send_members(&members, &shared, &mut output);
        output.flush().and(sent)?;
        self.told = (members, shared);
        Ok(round)
    }

    /// Sends what [`Self::hold`] has added or removed since the last round of a frozen VE.
    pub fn last_objects(&mut self, sink: &mut impl Sink) -> Result<(), TrackError> {
        let (members, before) = std::mem::take(&mut self.told);
        self.frozen = true;
        let shared = self.refresh_shared(&members);
        self.frozen = false;
        let shared = shared?;
        if shared == before {
            return Ok(());
        }
        let mut round = Round::default();
        let mut output = Output::new(sink, &mut round);
        // The processes are there, and not new any more.
        let old = |member: Member| Shape { heir: false, ..member.shape };
        let processes = members.into_iter().map(old).collect();
        let new: Vec<u64> = shared
            .iter()
            .map(|object| object.id)
            .filter(|id| before.iter().all(|object| object.id != *id))
            .collect();
        output.send(Record::Layout(Layout { processes, shared }))?;
        for id in new {
            if let Some(object) = self.shared.get_mut(&id) {
                object.send_changes(&mut output)?;
            }
        }
        output.flush()
    }

    fn send_members<S: Sink>(
        &mut self,
        members: &[Member],
        shared: &[SharedObject],
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let last = members.iter().map(|member| member.stage).max().unwrap_or(0);
        for stage in 0..=last {
            let there = members.iter().filter(|member| member.stage <= stage);
            let processes = there.map(|member| member.shape.clone()).collect();
            output.send(Record::Layout(Layout { processes, shared: shared.to_vec() }))?;
            if stage == 0 {
                for object in self.shared.values_mut() {
                    object.send_changes(output)?;
                }
            }
            for member in members.iter().filter(|member| member.stage == stage) {
                self.send_process(member, shared, output)?;
            }
        }
        Ok(())
    }

    fn send_process<S: Sink>(
        &mut self,
        member: &Member,
        shared: &[SharedObject],
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let Some(mut tracked) = self.processes.remove(&member.host) else { return Ok(()) };
        let parent = self.processes.get(&member.parent_host);
        if member.shape.heir
            && let Some(parent) = parent
        {
            tracked.inherit(parent);
        }
        let sent = tracked
            .send_areas(shared, output)
            .and_then(|()| tracked.send_written(self.frozen, self.leaves, parent, output));
        self.processes.insert(member.host, tracked);
        sent
    }

    /// Says which objects travel although no process maps them, in place of what was said before:
    /// open memfds and files without a name, segments that nobody has attached. The files are
    /// open for reading.
    pub fn hold(&mut self, objects: Vec<(SharedObject, File)>) {
        self.open.clear();
        for (object, file) in objects {
            self.open.insert(object.id, object.clone());
            self.shared.entry(object.id).or_insert_with(|| TrackedObject::new(file, object));
        }
    }

    /// As [`Self::round`] for a VE whose processes are frozen: nothing is armed any more, and
    /// every page that could not be read is an error.
    pub fn last_round(&mut self, sink: &mut impl Sink) -> Result<Round, TrackError> {
        let start = Instant::now();
        loop {
            self.frozen = true;
            let result = self.round(sink);
            self.frozen = false;
            match result {
                // What was dying when the VE stopped goes on to die: nothing can freeze it.
                Err(error) if error.is_transient() && start.elapsed() < DYING => {}
                other => return other,
            }
        }
    }

    /// As [`Self::last_round`], but plain memory that was written is kept back, to be fetched when
    /// the VE runs on the target: see [`Self::send_needed`].
    pub fn last_round_without_memory(&mut self, sink: &mut impl Sink) -> Result<Round, TrackError> {
        self.leaves = true;
        let result = self.last_round(sink);
        self.leaves = false;
        result
    }

    /// Sends what was kept back although it is needed at once, and returns the rest. The
    /// processes were captured after the last round.
    pub fn send_needed(
        &mut self,
        processes: &Processes,
        sink: &mut impl Sink,
    ) -> Result<Later, TrackError> {
        let mut round = Round::default();
        let mut output = Output::new(sink, &mut round);
        let mut later = Later::new();
        for tracked in self.processes.values_mut().filter(|it| it.left_bytes() > 0) {
            let pid = tracked.inner();
            let Some(process) = processes.processes.iter().find(|it| it.pid == pid) else {
                return Err(TrackError::Memory { pid, source: io::ErrorKind::NotFound.into() });
            };
            let runs = tracked.send_needed(process, &mut output)?;
            if !runs.is_empty() {
                later.insert(pid, runs);
            }
        }
        output.flush()?;
        Ok(later)
    }

    /// The processes of the last round that are not zombies: number in the VE and on the host.
    pub fn processes(&self) -> impl Iterator<Item = &Tracked> {
        self.processes.values()
    }

    /// The processes of the last round that the host has put into the VE (`vzctl exec`), as
    /// numbered on the host: they are not part of its tree, and cannot move with it.
    pub fn strangers(&self) -> &[i32] {
        &self.strangers
    }

    /// Brings the list of processes up to date and arms the new ones.
    fn refresh(&mut self) -> Result<Vec<Member>, TrackError> {
        // Before anything is read: what is changed meanwhile is read again the next time.
        let marks = self.init.map(|init| self.surgeon.marks(init));
        let none = HashMap::new();
        let before = marks.as_ref().unwrap_or(&none);
        let seen = self.known.list(&self.cgroup, self.frozen, self.id_base, before)?;
        let order = in_tree_order(&seen);
        self.init = order.first().map(|init| init.host);
        let marks = marks.or_else(|| self.init.map(|init| self.surgeon.marks(init)));
        let marks = marks.unwrap_or_default();
        let in_tree: HashSet<i32> = order.iter().map(|process| process.host).collect();
        let hosts = seen.iter().map(|process| process.host);
        self.strangers = hosts.filter(|host| !in_tree.contains(host)).collect();
        let living = seen.iter().filter(|process| process.zombie.is_none());
        let living: HashMap<i32, u64> =
            living.map(|process| (process.host, process.start_time)).collect();
        self.processes.retain(|host, tracked| living.get(host) == Some(&tracked.start_time()));
        for (host, tracked) in &mut self.processes {
            tracked.compare_places(marks.get(host).map(|mark| mark.places));
        }
        let unchanged = if self.frozen { self.unchanged(&marks) } else { HashSet::new() };
        let mut there = Vec::with_capacity(order.len());
        for seen in order {
            let refreshed = match seen.zombie {
                None if !unchanged.contains(&seen.host) => {
                    self.refresh_process(&seen, marks.get(&seen.host))
                }
                _ => Ok(()),
            };
            match refreshed {
                Ok(()) => there.push(seen),
                Err(error) if !self.frozen && error.is_transient() => {}
                Err(error) => return Err(error),
            }
        }
        self.arrange(there)
    }

    /// The processes whose areas need not be read again, in a VE that stands still: they have not
    /// changed since, nor have the names of the files in them. Those are looked at once for all
    /// processes that have the same files.
    fn unchanged(&mut self, marks: &HashMap<i32, Mark>) -> HashSet<i32> {
        let mut named = HashMap::new();
        let mut unchanged = HashSet::new();
        for (&host, tracked) in &mut self.processes {
            let areas = marks.get(&host).and_then(|mark| mark.areas);
            let Some(names) = tracked.names_if(areas) else { continue };
            let space = tracked.namespaces().mounts;
            let same = named.entry((names, space)).or_insert_with(|| tracked.has_same_names());
            if *same {
                unchanged.insert(host);
            }
        }
        unchanged
    }

    /// Finds out who must be born again, who inherits, and in which order all are to be sent.
    fn arrange(&mut self, there: Vec<Seen>) -> Result<Vec<Member>, TrackError> {
        // One whose parent has ended meanwhile is seen again in the next round.
        let mut members: Vec<Member> = Vec::with_capacity(there.len());
        let mut places = HashMap::new();
        for seen in there {
            let parent = places.get(&seen.parent).map(|&place: &usize| &members[place]);
            if seen.inner != 1 && parent.is_none() {
                continue;
            }
            let parent_host = parent.map_or(0, |parent| parent.host);
            let stage = parent.map_or(0, |parent| parent.stage);
            places.insert(seen.inner, members.len());
            members.push(Member { host: seen.host, parent_host, stage, shape: seen.shape() });
        }
        if members.first().is_none_or(|init| init.shape.pid != 1) {
            return Err(TrackError::Ended);
        }
        for member in &mut members {
            if let Some(tracked) = self.processes.get(&member.host) {
                member.shape.namespaces = tracked.namespaces();
            } else if let Some(spaces) = &self.spaces {
                // Of the dead nothing else is left.
                member.shape.namespaces.pid = spaces.pids_of(member.host);
            }
        }
        let mut members = founders_first(members);
        let places: HashMap<i32, usize> =
            members.iter().enumerate().map(|(place, member)| (member.shape.pid, place)).collect();
        let founders: HashMap<u32, usize> = members
            .iter()
            .enumerate()
            .filter(|(_, member)| is_founder(&member.shape))
            .map(|(place, member)| (member.shape.namespaces.pid, place))
            .collect();
        let shapes = members.iter().map(|member| &member.shape);
        let living: Vec<Shape> = shapes.filter(|shape| shape.zombie.is_none()).cloned().collect();
        let parted = kin::part(&mut self.kin, &living);
        self.kin = living.iter().map(|shape| (shape.pid, Kin::of(shape))).collect();
        for place in 0..members.len() {
            let (host, pid) = (members[place].host, members[place].shape.pid);
            if let Some(tracked) = self.processes.get_mut(&host) {
                if parted.contains(&pid) {
                    tracked.begin_again(&mut self.lives);
                }
                members[place].shape.life = tracked.life();
            }
            let Some(&parent) = places.get(&members[place].shape.parent) else { continue };
            let founder = founders.get(&members[place].shape.namespaces.pid);
            let founded = founder.filter(|&&founder| founder != place);
            let founded = founded.map_or(0, |&founder| members[founder].stage);
            let stage = members[parent].stage.max(founded);
            let heir = self.is_heir(&members[place], &members[parent].shape);
            let member = &mut members[place];
            member.shape.heir = heir;
            // After its parent and the founder of its pid namespace; an heir after a whole parent.
            member.stage = stage + usize::from(heir);
        }
        Ok(members)
    }

    /// Whether a process is new to the target and has memory in common with its parent.
    fn is_heir(&self, member: &Member, parent: &Shape) -> bool {
        let shape = &member.shape;
        let can_inherit = shape.session == parent.session || shape.session == shape.pid;
        let tracked = self.processes.get(&member.host).filter(|tracked| tracked.is_new());
        match (tracked, self.processes.get(&member.parent_host)) {
            (Some(tracked), Some(parent)) => can_inherit && tracked.shares_with(parent),
            _ => false,
        }
    }

    fn refresh_process(&mut self, seen: &Seen, mark: Option<&Mark>) -> Result<(), TrackError> {
        let tracked = match self.processes.entry(seen.host) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let tracked = Tracked::new(seen.host, seen.inner, seen.start_time);
                entry.insert(tracked.with_ended(seen.ended))
            }
        };
        let surgeon = (!self.frozen && !seen.blocked).then_some(&self.surgeon);
        // What stands still was looked at a moment ago, and is looked at once more by others.
        if let Some(spaces) = &self.spaces
            && !tracked.is_in_place()
            && (!self.frozen || !tracked.is_placed())
        {
            tracked.place(spaces, mark.map(|mark| mark.places))?;
        }
        tracked.refresh(&mut self.lives, surgeon, mark.and_then(|mark| mark.areas))
    }

    fn refresh_shared(&mut self, members: &[Member]) -> Result<Vec<SharedObject>, TrackError> {
        if self.frozen {
            segments::check(self.processes.values(), self.spaces.as_deref())?;
        }
        let tracked = members.iter().filter_map(|member| self.processes.get(&member.host));
        let objects: HashMap<u64, (i32, u32, (u64, u64))> = tracked
            .flat_map(|tracked| {
                let (host, ipc) = (tracked.host(), tracked.namespaces().ipc);
                let shared = tracked.space().shared.iter();
                shared.map(move |(&object, &range)| (object, (host, ipc, range)))
            })
            .collect();
        self.shared.retain(|id, _| objects.contains_key(id) || self.open.contains_key(id));
        let mut shared = Vec::with_capacity(objects.len());
        for (&object, &(host, ipc, range)) in &objects {
            let tracked = match self.shared.entry(object) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    match TrackedObject::open(host, range, object, self.id_base, ipc) {
                        Ok(tracked) => entry.insert(tracked),
                        Err(source) if self.frozen => {
                            return Err(TrackError::Shared { object, source });
                        }
                        Err(_) => continue,
                    }
                }
            };
            shared.push(tracked.describe()?);
        }
        for object in self.open.keys().filter(|object| !objects.contains_key(object)) {
            if let Some(tracked) = self.shared.get_mut(object) {
                shared.push(tracked.describe()?);
            }
        }
        shared.sort_by_key(|object| object.id);
        Ok(shared)
    }
}

/// A process of one round.
#[derive(Debug)]
struct Member {
    host: i32,
    parent_host: i32,
    /// Heirs come after their parents: this is how many of its ancestors are new heirs.
    stage: usize,
    shape: Shape,
}

/// Whether a process is the one with which its pid namespace begins.
fn is_founder(shape: &Shape) -> bool {
    shape.below.process.last() == Some(&1)
}

/// Puts the process with which a pid namespace begins before all others in it, and leaves parents
/// before their children.
fn founders_first(members: Vec<Member>) -> Vec<Member> {
    let spaces = members.iter().filter(|member| is_founder(&member.shape));
    let mut coming: HashSet<u32> = spaces.map(|member| member.shape.namespaces.pid).collect();
    if coming.is_empty() {
        return members;
    }
    let mut there = HashSet::from([0]);
    let (mut order, mut waiting) = (Vec::with_capacity(members.len()), members);
    loop {
        let before = order.len();
        let mut still = Vec::new();
        for member in waiting {
            let shape = &member.shape;
            let founder = is_founder(shape);
            let ready = founder || !coming.contains(&shape.namespaces.pid);
            if !ready || !there.contains(&shape.parent) {
                still.push(member);
                continue;
            }
            if founder {
                coming.remove(&shape.namespaces.pid);
            }
            there.insert(shape.pid);
            order.push(member);
        }
        // What is left waits for each other; that was never so in the kernel.
        if still.is_empty() || order.len() == before {
            order.extend(still);
            return order;
        }
        waiting = still;
    }
}

#[cfg(test)]
mod tests {
    use ckpt_format::{container::Namespaces, process::Below};

    use super::*;

    fn member(pid: i32, parent: i32, space: u32, below: &[i32]) -> Member {
        let namespaces = Namespaces { pid: space, ..Namespaces::default() };
        let below = Below { process: below.to_vec(), ..Below::default() };
        let shape = Shape { pid, parent, namespaces, below, ..Shape::default() };
        Member { host: pid, parent_host: parent, stage: 0, shape }
    }

    #[test]
    fn a_pid_namespace_begins_before_others_are_in_it() {
        let members = vec![
            member(1, 0, 0, &[]),
            member(2, 1, 1, &[2]),
            member(3, 1, 0, &[]),
            member(4, 2, 0, &[]),
            member(5, 3, 1, &[1]),
        ];
        let order = founders_first(members).iter().map(|it| it.shape.pid).collect::<Vec<_>>();
        assert_eq!(order, [1, 3, 5, 2, 4]);
    }
}
