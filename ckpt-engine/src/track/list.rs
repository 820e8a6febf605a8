//! Which processes a VE has, as they are numbered inside it.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::{Duration, Instant},
};

use ckpt_format::{
    container::Namespaces,
    process::{Below, Common, Identity, Shape},
};

use super::TrackError;
use crate::{
    capture::IdMap,
    container::ID_COUNT,
    procfs::{self, ProcError, Stat, Status},
    surgeon::{KinMark, Mark},
    sys::task,
};

/// How long a process may take to die, in a VE that stands still.
pub(super) const DYING: Duration = Duration::from_secs(1);

/// One process seen in the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its number on the host, or that of a thread if the first one has ended.
    pub(super) host: i32,
    /// The first one, where that has ended.
    pub(super) ended: Option<i32>,
    pub(super) start_time: u64,
    pub(super) inner: i32,
    pub(super) parent: i32,
    pub(super) zombie: Option<i32>,
    pub(super) exit_signal: i32,
    pub(super) group: i32,
    pub(super) session: i32,
    /// What it has in common with its parent.
    pub(super) common: Common,
    /// Does not come to a stop of ours, or would show it: stopped by a signal.
    pub(super) blocked: bool,
    /// In the pid namespaces below that of the VE.
    pub(super) below: Below,
}

impl Seen {
    /// As the target is told of it, but for what only its memory tells.
    pub(super) fn shape(&self) -> Shape {
        Shape {
            pid: self.inner,
            life: self.start_time,
            parent: self.parent,
            group: self.group,
            session: self.session,
            exit_signal: self.exit_signal,
            zombie: self.zombie,
            heir: false,
            namespaces: Namespaces::default(),
            common: self.common,
            below: self.below.clone(),
        }
    }
}

/// The processes as they were seen last.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<i32, Entry>);

#[derive(Clone, Debug)]
struct Entry {
    seen: Seen,
    /// Its parent, as numbered on the host.
    parent: i32,
    /// What the kernel said of it before it was looked at.
    mark: Option<KinMark>,
}

impl Known {
    /// Lists the processes in a cgroup as they are numbered inside the VE. Zombies are in no cgroup
    /// any more: they are looked for when it counts, in a VE that stands still. Whoever there has
    /// the same mark as before is not looked at again; `marks` were read before.
    pub(super) fn list(
        &mut self,
        cgroup: &Path,
        still: bool,
        id_base: u32,
        marks: &HashMap<i32, Mark>,
    ) -> Result<Vec<Seen>, TrackError> {
        let mut hosts = procfs::cgroup_processes(cgroup)
            .map_err(|source| TrackError::List { cgroup: cgroup.to_owned(), source })?;
        if still {
            hosts.extend(zombies(&hosts, marks)?);
        }
        let mut before = std::mem::take(&mut self.0);
        let mut kept = HashSet::new();
        for host in hosts {
            let mark = marks.get(&host).map(|mark| mark.kin);
            let same = |entry: &Entry| still && mark.is_some() && entry.mark == mark;
            if let Some(entry) = before.remove(&host).filter(same) {
                kept.insert(host);
                self.0.insert(host, entry);
                continue;
            }
            match see(host, still, id_base, mark) {
                Ok(entry) => drop(self.0.insert(host, entry)),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let inner: HashMap<i32, i32> =
            self.0.iter().map(|(&host, entry)| (host, entry.seen.inner)).collect();
        for (host, entry) in &mut self.0 {
            let parent = inner.get(&entry.parent);
            entry.seen.parent = parent.copied().unwrap_or(0);
            if parent.is_some() && !(kept.contains(host) && kept.contains(&entry.parent)) {
                entry.seen.common = common(&entry.seen, entry.parent);
            }
        }
        let mut seen: Vec<Seen> = self.0.values().map(|entry| entry.seen.clone()).collect();
        seen.sort_unstable_by_key(|seen| seen.host);
        Ok(seen)
    }
}

/// The dead that nobody has collected, in a VE that stands still.
fn zombies(living: &[i32], marks: &HashMap<i32, Mark>) -> Result<Vec<i32>, ProcError> {
    let known: HashSet<i32> = living.iter().copied().collect();
    let mut dead: Vec<i32> = if marks.is_empty() {
        let children = living.iter().map(|&host| procfs::children(host));
        children.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()
    } else {
        // The kernel's records tell of the host's own, too: the dead have no namespaces. Whoever has
        // to collect one of the VE is in it.
        let is_ours = |mark: &Mark| mark.kin.dead && known.contains(&mark.kin.parent);
        marks.iter().filter(|(_, mark)| is_ours(mark)).map(|(&host, _)| host).collect()
    };
    dead.retain(|host| !known.contains(host));
    Ok(dead)
}

/// What a process has in common with its parent.
fn common(process: &Seen, parent: i32) -> Common {
    let share = |what| {
        // Of the dead nothing is left, which the kernel would call the same.
        process.zombie.is_none() && task::share(process.host, parent, what).unwrap_or(false)
    };
    Common {
        descriptors: share(task::Common::Descriptors),
        directories: share(task::Common::Directories),
    }
}

/// A process as it is; one that is dying has no memory any more, and is waited for until it shows
/// as dead if `settled` is asked for.
fn stat_of(host: i32, settled: bool) -> Result<Stat, ProcError> {
    let start = Instant::now();
    loop {
        let stat = Stat::read(host)?;
        let dead = matches!(stat.state, 'Z' | 'X');
        if !settled || dead || stat.field::<u64>(23, "vsize")? > 0 || start.elapsed() > DYING {
            return Ok(stat);
        }
        std::thread::yield_now();
    }
}

fn see(host: i32, settled: bool, id_base: u32, mark: Option<KinMark>) -> Result<Entry, ProcError> {
    let stat = stat_of(host, settled)?;
    let status = Status::read(host)?;
    let is_dead = matches!(stat.state, 'Z' | 'X');
    // Its life goes on with other threads, and is another one with the next of them.
    let stand_in = if is_dead { procfs::stand_in(host) } else { None };
    let living = stand_in.map(Stat::read).transpose()?;
    let living = living.as_ref().unwrap_or(&stat);
    let ended = stand_in.map(|_| host);
    let host = stand_in.unwrap_or(host);
    let zombie = match is_dead && ended.is_none() {
        true => Some(stat.field(52, "exit_code")?),
        false => None,
    };
    let mut seen = Seen {
        host,
        ended,
        start_time: living.field(22, "starttime")?,
        inner: status.in_ve("NSpid")?,
        parent: 0,
        common: Common::default(),
        zombie,
        exit_signal: stat.field(38, "exit_signal")?,
        group: status.in_ve("NSpgid")?,
        session: status.in_ve("NSsid")?,
        blocked: matches!(living.state, 'D' | 'T'),
        below: Below {
            process: status.below_ve("NSpid")?,
            group: status.below_ve("NSpgid")?,
            session: status.below_ve("NSsid")?,
            ..Below::default()
        },
    };
    if !seen.below.process.is_empty() {
        seen.below.identity = identity(&status, id_base)?;
        // The dead are nowhere.
        seen.below.directory = procfs::link(host, "cwd").unwrap_or_default();
    }
    let parent = stat.field(4, "ppid")?;
    let told = (parent, stat.field(5, "pgrp")?, stat.field(6, "session")?, seen.exit_signal);
    // Who it is in a namespace below can change without a change of its relations. And what tells
    // something else than `/proc` is of another moment, or not understood.
    let good = |mark: &KinMark| {
        seen.below.process.is_empty()
            && mark.dead == seen.zombie.is_some()
            && (mark.parent, mark.group, mark.session, mark.exit_signal) == told
    };
    Ok(Entry { mark: mark.filter(good), parent, seen })
}

/// Who a process is, as numbered inside the VE.
fn identity(status: &Status, id_base: u32) -> Result<Identity, ProcError> {
    let inside = |key| -> Result<Vec<u32>, ProcError> {
        let ids = IdMap { base: id_base, count: ID_COUNT };
        Ok(status.numbers(key, 10)?.into_iter().map(|id| ids.inside(id)).collect())
    };
    let four = |key| Ok::<_, ProcError>(inside(key)?.try_into().unwrap_or([65534; 4]));
    Ok(Identity { users: four("Uid")?, groups: four("Gid")?, supplementary: inside("Groups")? })
}

/// Parents before children, from the VE's init on; what hangs outside its tree is left out.
pub(super) fn in_tree_order(seen: &[Seen]) -> Vec<Seen> {
    let mut children: HashMap<i32, Vec<Seen>> = HashMap::new();
    let mut order: Vec<Seen> = Vec::with_capacity(seen.len());
    for process in seen {
        if process.inner == 1 {
            order.push(process.clone());
        } else if process.parent != 0 {
            children.entry(process.parent).or_default().push(process.clone());
        }
    }
    let mut next = 0;
    while let Some(process) = order.get(next) {
        order.extend(children.remove(&process.inner).unwrap_or_default());
        next += 1;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_of_the_host_are_not_those_of_a_ve() {
        let mark = |parent, dead| {
            let kin = KinMark {
                born_ns: 0,
                dead,
                exit_signal: 17,
                parent,
                group: 0,
                session: 0,
                descriptors: 0,
                directories: 0,
            };
            Mark { kin, areas: None, places: [0; 9] }
        };
        let marks = HashMap::from([
            (10, mark(1, false)),
            (11, mark(10, true)),
            (12, mark(10, false)),
            (20, mark(1, true)),
        ]);
        assert_eq!(zombies(&[10, 12], &marks).unwrap(), [11]);
    }
}
