//! Reads what a container looks like from outside: its names, clocks and mounts.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{
    blocker::Blocker,
    container::{
        Clocks, Container as Plan, FilesystemKind, Mount, Names, Nested, covers, late, locked,
        parts,
    },
    network::Network,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    ContainerError,
    error::step,
    layers,
    numbered::parts_in_threads,
    read_proc,
    spaces::{Spaces, foreign_namespaces},
    table::{self, Reader},
};
use crate::{
    procfs::{self, Stat, Status},
    sys::{clone, namespace, task},
};

/// What stands in the way of moving a container, or what it looks like.
pub type Captured = Result<Found, Vec<Blocker>>;

/// What a container looks like, and a hold on it while it runs on.
#[derive(Debug)]
pub struct Found {
    /// How to make it again. What is in network namespaces of programs is for the caller to find.
    pub plan: Plan,
    /// Who is in which namespace.
    pub spaces: Spaces,
}

/// Reads the container whose pid 1 has this number, and in which these processes live. What
/// cannot be made again elsewhere is told as blockers, all at once.
pub fn capture(init: i32, pids: &[i32]) -> Result<Captured, ContainerError> {
    let read = |name: &str| read_proc(&format!("/proc/{init}/{name}"));
    let base = id_base(&read("uid_map").map_err(step("read the id map"))?);
    let spaces = Spaces::of(init, pids).map_err(step("find the namespaces"))?;
    let tables = spaces.tables().map_err(step("read the mounts"))?;
    let process = clone::open_process(init).map_err(step("read the names"))?;
    let own = names(process.as_fd()).map_err(step("read the names"))?;
    let offsets = read("timens_offsets").map_err(step("read the clocks"))?;
    let clocks = clocks(&offsets).map_err(step("read the clocks"))?;
    let date_ns = date().map_err(step("read the clocks"))?;
    let Some(first) = tables.first() else { return Err(ContainerError::Gone) };
    let mut reader = Reader::new(base, first, spaces.numbers());
    reader.loopbacks = spaces.loopbacks().map_err(step("read the networks"))?;
    reader.mailboxes = spaces.mailboxes().map_err(step("read the message queues"))?;
    reader.look_into_procs(&tables, spaces.pid_numbers());
    let mut mounts: Vec<Vec<Mount>> = tables.iter().map(|table| reader.read(table)).collect();
    for (place, mounts) in mounts.iter_mut().skip(1).enumerate() {
        spaces.lock(place, mounts).map_err(step("find which mounts are locked"))?;
    }
    let Reader { mut filesystems, mut blockers, known, .. } = reader;
    let owners = spaces.owners();
    let site = layers::Site {
        namespaces: spaces.mount_namespaces(),
        tables: mounts.iter().map(Vec::as_slice).collect(),
        owners: &owners.mounts,
        known: &known,
    };
    let unfound = site.find(&mut filesystems).into_iter();
    blockers.extend(unfound.map(|(object, point)| table::unmovable(&object, &point)));
    blockers.extend(foreign_namespaces(init, pids));
    let tops = spaces.cgroups(init, pids).map_err(step("read the cgroup namespaces"))?;
    if tops.contains(&None) {
        let object = "a cgroup namespace that belongs to a user namespace, or whose top has nobody";
        blockers.push(unmovable(object, "end the program that is in it"));
    }
    let times = spaces.times(init, pids).map_err(step("read the time namespaces"))?;
    if times.contains(&None) {
        let object =
            "a time namespace that belongs to a user namespace, or whose clocks nobody shows";
        blockers.push(unmovable(object, "end the program that is in it"));
    }
    blockers.extend(uneven(&spaces, pids));
    blockers.extend(pids.iter().filter_map(|&pid| parted(pid)));
    let named = |names_of: &OwnedFd| names(names_of.as_fd());
    let names = spaces.names().iter().map(named).collect::<io::Result<_>>();
    let nested = Nested {
        mounts: mounts.split_off(1),
        names: names.map_err(step("read the names"))?,
        ipcs: u32::try_from(spaces.ipcs().len()).unwrap_or(u32::MAX),
        networks: spaces.networks().iter().map(|_| Network::default()).collect(),
        cgroups: tops.into_iter().map(Option::unwrap_or_default).collect(),
        users: spaces.users(base).map_err(step("read the user namespaces"))?,
        owners,
        times: times.into_iter().map(Option::unwrap_or_default).collect(),
    };
    for mounts in &nested.mounts {
        blockers.extend(hidden(mounts).map(|point| {
            let object = format!("a locked mount on {point} that is hidden by another one");
            unmovable(&object, "end the program that has it in a user namespace of its own")
        }));
    }
    let mounts = mounts.pop().unwrap_or_default();
    let Names { hostname, domainname } = own;
    let plan = Plan { hostname, domainname, clocks, date_ns, filesystems, mounts, nested };
    blockers.extend(plan.nested.mounts.iter().flat_map(|mounts| late_and_locked(&plan, mounts)));
    if let Err(point) = parts(&plan) {
        let object = format!("a file in memory that only its mount on {point} shows");
        blockers.push(unmovable(&object, &format!("unmount {point} inside the VE")));
    }
    Ok(if blockers.is_empty() { Ok(Found { plan, spaces }) } else { Err(blockers) })
}

/// Processes in user namespaces that cannot be made there. Not every user has a number there, and
/// whoever enters one has no threads yet, and directories of its own.
fn uneven(spaces: &Spaces, pids: &[i32]) -> Vec<Blocker> {
    let apart = |pid: i32| spaces.number(pid).is_ok_and(|it| it.is_some_and(|it| it.user != 0));
    let mut blockers = Vec::new();
    for &pid in pids.iter().filter(|&&pid| apart(pid)) {
        let threads = procfs::threads(pid).unwrap_or_default();
        let status = |&tid: &i32| Status::of_thread(pid, tid).ok();
        let all: Vec<Status> = threads.iter().filter_map(status).collect();
        let differs = |key| all.iter().any(|it| it.text(key).ok() != all[0].text(key).ok());
        let objects = [
            (
                ["Uid", "Gid", "Groups"].into_iter().any(differs),
                "threads that are different users in a user namespace",
            ),
            (
                shares_directories(pid, &threads),
                "directories in common with its parent, or apart between threads, in a user namespace",
            ),
        ];
        blockers.extend(objects.into_iter().filter(|(found, _)| *found).map(|(_, object)| {
            Blocker {
                pid: all.first().and_then(|it| it.in_ve("NSpid").ok()).unwrap_or(pid),
                command: all
                    .first()
                    .and_then(|it| it.text("Name").ok())
                    .unwrap_or_default()
                    .to_owned(),
                fd: None,
                object: object.to_owned(),
                hint: "end the program".to_owned(),
            }
        }));
    }
    blockers
}

/// Each overlay, and `/proc` of a pid namespace, that a user namespace came with.
fn late_and_locked(plan: &Plan, mounts: &[Mount]) -> Vec<Blocker> {
    let both = late(plan, mounts).into_iter().zip(locked(mounts)).zip(mounts);
    let both = both.filter(|((late, locked), _)| *late && *locked);
    let blocker = |(_, mount): (_, &Mount)| {
        let place = usize::try_from(mount.filesystem).ok();
        let shown = place.and_then(|place| plan.filesystems.get(place));
        let what = match shown.map(|shown| &shown.kind) {
            Some(FilesystemKind::Overlay(_)) => "overlay",
            _ => "/proc of a pid namespace",
        };
        let object = format!("a locked {what} on {}", mount.point);
        unmovable(&object, "end the program that has it in a user namespace of its own")
    };
    both.map(blocker).collect()
}

/// A process one of whose threads bears children into another pid namespace.
fn parted(pid: i32) -> Option<Blocker> {
    let threads = procfs::threads(pid).ok().filter(|threads| threads.len() > 1)?;
    if !parts_in_threads(pid, &threads) {
        return None;
    }
    let status = Status::read(pid).ok()?;
    Some(Blocker {
        pid: status.in_ve("NSpid").ok()?,
        command: status.text("Name").unwrap_or_default().to_owned(),
        fd: None,
        object: "a thread whose children are born into another pid namespace".to_owned(),
        hint: "end the program".to_owned(),
    })
}

/// Whether root and working directory are not those of all threads, and of nobody else.
fn shares_directories(pid: i32, threads: &[i32]) -> bool {
    let same = |other: i32| task::share(pid, other, task::Common::Directories).ok();
    let ended = |tid: i32| Stat::read(tid).map_or(true, |stat| "ZX".contains(stat.state));
    let parent = Stat::read(pid).and_then(|stat| stat.field(4, "ppid"));
    parent.is_ok_and(|parent| same(parent) == Some(true))
        || threads.iter().any(|&tid| tid != pid && same(tid) == Some(false) && !ended(tid))
}

/// The points of locked mounts that other locked ones hide.
fn hidden(mounts: &[Mount]) -> impl Iterator<Item = &str> {
    let with_all_above = locked(mounts);
    let covered = move |&place: &usize| {
        with_all_above[place]
            && covers(mounts, place).iter().any(|cover| {
                let mut others = mounts.iter().zip(&with_all_above).enumerate();
                others.any(|(other, (mount, &locked))| {
                    other != place && locked && mount.point == cover.point
                })
            })
    };
    (1..mounts.len()).filter(covered).map(|place| mounts[place].point.as_str())
}

fn unmovable(object: &str, hint: &str) -> Blocker {
    Blocker {
        pid: 1,
        command: "init".to_owned(),
        fd: None,
        object: object.to_owned(),
        hint: hint.to_owned(),
    }
}

fn id_base(map: &str) -> u32 {
    map.split_whitespace().nth(1).and_then(|base| base.parse().ok()).unwrap_or(0)
}

/// The names in the UTS namespace of a process, or behind a descriptor of one.
fn names(of: BorrowedFd<'_>) -> io::Result<Names> {
    namespace::in_names_of(of, || {
        let names = nix::sys::utsname::uname()?;
        let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
        let domain = text(names.domainname());
        let domain = if domain == "(none)" { String::new() } else { domain };
        Ok(Names { hostname: text(names.nodename()), domainname: domain })
    })
}

/// How far the clocks of a container are ahead of the host's.
pub fn clock_offsets(init: i32) -> io::Result<Clocks> {
    Ok(parse_offsets(&read_proc(&format!("/proc/{init}/timens_offsets"))?))
}

/// What the clocks show inside, from the host's and the offsets of the namespace.
fn clocks(offsets: &str) -> io::Result<Clocks> {
    let (host, offsets) = (host_clocks()?, parse_offsets(offsets));
    Ok(Clocks {
        monotonic_ns: host.monotonic_ns.saturating_add(offsets.monotonic_ns),
        boottime_ns: host.boottime_ns.saturating_add(offsets.boottime_ns),
    })
}

fn parse_offsets(offsets: &str) -> Clocks {
    let offset = |clock: &str| {
        let mut words = offsets.lines().find(|line| line.starts_with(clock))?.split_whitespace();
        let seconds: i64 = words.nth(1)?.parse().ok()?;
        let rest: i64 = words.next()?.parse().ok()?;
        Some(seconds.saturating_mul(1_000_000_000).saturating_add(rest))
    };
    Clocks {
        monotonic_ns: offset("monotonic").unwrap_or(0),
        boottime_ns: offset("boottime").unwrap_or(0),
    }
}

/// As `/proc/PID/timens_offsets` takes them.
pub(crate) fn offset_lines(offsets: Clocks) -> String {
    let line = |clock: &str, ns: i64| {
        let (seconds, rest) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
        format!("{clock} {seconds} {rest}\n")
    };
    line("monotonic", offsets.monotonic_ns) + &line("boottime", offsets.boottime_ns)
}

/// An offer arrives much sooner; hosts whose dates are further apart tell nothing about it.
const DATES_APART_MAX_NS: i64 = 1_000_000_000;

/// What the clocks show on the host.
pub fn host_clocks() -> io::Result<Clocks> {
    Ok(Clocks {
        monotonic_ns: read_clock(ClockId::CLOCK_MONOTONIC)?,
        boottime_ns: read_clock(ClockId::CLOCK_BOOTTIME)?,
    })
}

/// The date of the host, in nanoseconds since 1970: [`Plan::date_ns`] of clocks that were read just
/// before.
pub fn date() -> io::Result<i64> {
    read_clock(ClockId::CLOCK_REALTIME)
}

fn read_clock(clock: ClockId) -> io::Result<i64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec().saturating_mul(1_000_000_000) + time.tv_nsec())
}

/// What the clocks of a container show now, on another host, if they have gone on since it was
/// described. How long that took the dates of both hosts tell, when they are less than a
/// second apart; if not, no time has passed.
pub fn clocks_now(plan: &Plan) -> io::Result<Clocks> {
    let passed = date()?.saturating_sub(plan.date_ns);
    let passed = if (0..=DATES_APART_MAX_NS).contains(&passed) { passed } else { 0 };
    Ok(Clocks {
        monotonic_ns: plan.clocks.monotonic_ns.saturating_add(passed),
        boottime_ns: plan.clocks.boottime_ns.saturating_add(passed),
    })
}
