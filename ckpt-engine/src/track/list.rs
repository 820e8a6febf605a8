//! Which processes a VE has, as they are numbered inside it.

use std::{
    collections::HashMap,
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
    sys::task,
};

/// How long a process may take to die, in a VE that stands still.
pub(super) const DYING: Duration = Duration::from_secs(1);

/// One process seen in the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) host: i32,
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

/// Lists the processes in a cgroup as they are numbered inside the VE. Zombies are in no cgroup
/// any more: they are looked for, as children of the others, when it counts.
pub(super) fn list(cgroup: &Path, zombies: bool, id_base: u32) -> Result<Vec<Seen>, TrackError> {
    let mut hosts = procfs::cgroup_processes(cgroup)
        .map_err(|source| TrackError::List { cgroup: cgroup.to_owned(), source })?;
    if zombies {
        for index in 0..hosts.len() {
            let children = procfs::children(hosts[index])?;
            let new = children.into_iter().filter(|child| !hosts.contains(child));
            hosts.extend(new.collect::<Vec<_>>());
        }
    }
    let mut inner_by_host = HashMap::new();
    let mut seen = Vec::with_capacity(hosts.len());
    for host in hosts {
        match see(host, zombies, id_base) {
            Ok((process, parent_host)) => {
                inner_by_host.insert(host, process.inner);
                seen.push((process, parent_host));
            }
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(seen
        .into_iter()
        .map(|(process, parent)| match inner_by_host.get(&parent) {
            Some(&inner) => Seen { parent: inner, common: common(&process, parent), ..process },
            None => process,
        })
        .collect())
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

fn see(host: i32, settled: bool, id_base: u32) -> Result<(Seen, i32), ProcError> {
    let stat = stat_of(host, settled)?;
    let status = Status::read(host)?;
    let zombie = match stat.state {
        'Z' | 'X' => Some(stat.field(52, "exit_code")?),
        _ => None,
    };
    let mut seen = Seen {
        host,
        start_time: stat.field(22, "starttime")?,
        inner: status.in_ve("NSpid")?,
        parent: 0,
        common: Common::default(),
        zombie,
        exit_signal: stat.field(38, "exit_signal")?,
        group: status.in_ve("NSpgid")?,
        session: status.in_ve("NSsid")?,
        blocked: matches!(stat.state, 'D' | 'T'),
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
    Ok((seen, stat.field(4, "ppid")?))
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
