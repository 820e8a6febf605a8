//! Reads what a container looks like from outside: its names, clocks and mounts.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{
    blocker::Blocker,
    container::{Clocks, Container as Plan, Mount, Names, Nested, parts},
    network::Network,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    ContainerError,
    error::step,
    read_proc,
    spaces::{Spaces, foreign_namespaces},
    table::Reader,
};
use crate::sys::{clone, namespace};

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
    let Some(first) = tables.first() else { return Err(ContainerError::Gone) };
    let mut reader = Reader::new(base, first);
    reader.networks.clone_from(spaces.network_numbers());
    reader.loopbacks = spaces.loopbacks().map_err(step("read the networks"))?;
    let mut mounts: Vec<Vec<Mount>> = tables.iter().map(|table| reader.read(table)).collect();
    let Reader { filesystems, mut blockers, .. } = reader;
    blockers.extend(foreign_namespaces(init, pids));
    if spaces.cgroups() > 0 {
        blockers.push(unmovable("a cgroup namespace of a program", "end the program"));
    }
    let named = |names_of: &OwnedFd| names(names_of.as_fd());
    let names = spaces.names().iter().map(named).collect::<io::Result<_>>();
    let nested = Nested {
        mounts: mounts.split_off(1),
        names: names.map_err(step("read the names"))?,
        ipcs: u32::try_from(spaces.ipcs()).unwrap_or(u32::MAX),
        networks: spaces.networks().iter().map(|_| Network::default()).collect(),
        cgroups: Vec::new(),
    };
    let mounts = mounts.pop().unwrap_or_default();
    let Names { hostname, domainname } = own;
    let plan = Plan { hostname, domainname, clocks, filesystems, mounts, nested };
    if let Err(point) = parts(&plan) {
        let object = format!("a file in memory that only its mount on {point} shows");
        blockers.push(unmovable(&object, &format!("unmount {point} inside the VE")));
    }
    Ok(if blockers.is_empty() { Ok(Found { plan, spaces }) } else { Err(blockers) })
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

/// What the clocks show on the host.
pub fn host_clocks() -> io::Result<Clocks> {
    let read = |clock| {
        let time = clock_gettime(clock)?;
        Ok::<_, io::Error>(time.tv_sec().saturating_mul(1_000_000_000) + time.tv_nsec())
    };
    Ok(Clocks {
        monotonic_ns: read(ClockId::CLOCK_MONOTONIC)?,
        boottime_ns: read(ClockId::CLOCK_BOOTTIME)?,
    })
}
