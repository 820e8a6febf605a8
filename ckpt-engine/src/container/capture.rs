//! Reads what a container looks like from outside: its names, clocks and mounts.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use ckpt_format::{
    blocker::Blocker,
    container::{
        Clocks, Container as Plan, Filesystem, FilesystemKind, HOST_DEVICES, Mount, MountOption,
    },
};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    time::{ClockId, clock_gettime},
};

use super::{ContainerError, ID_COUNT, error::step, mountinfo::Line, read_proc};
use crate::sys::{clone, mount::attribute, namespace};

/// What stands in the way of moving a container, or what it looks like.
pub type Captured = Result<Plan, Vec<Blocker>>;

/// Reads the container whose pid 1 has this number. What cannot be made again elsewhere is told
/// as blockers, all at once.
pub fn capture(init: i32) -> Result<Captured, ContainerError> {
    let read = |name: &str| read_proc(&format!("/proc/{init}/{name}"));
    let base = id_base(&read("uid_map").map_err(step("read the id map"))?);
    let table = read("mountinfo").map_err(step("read the mounts"))?;
    let root = File::open(format!("/proc/{init}/root")).map_err(step("open the root"))?;
    let (hostname, domainname) = names(init).map_err(step("read the names"))?;
    let offsets = read("timens_offsets").map_err(step("read the clocks"))?;
    let clocks = clocks(&offsets).map_err(step("read the clocks"))?;
    let mut reader =
        Reader { base, root, plan: Plan::default(), devices: Vec::new(), blockers: vec![] };
    let lines: Vec<Line> = table.lines().filter_map(Line::parse).collect();
    for index in attach_order(&lines) {
        reader.mount(&lines, &lines[index]);
    }
    if !reader.blockers.is_empty() {
        return Ok(Err(reader.blockers));
    }
    Ok(Ok(Plan { hostname, domainname, clocks, ..reader.plan }))
}

/// The processes that are not in the namespaces of their container's pid 1.
pub fn foreign_namespaces(init: i32, pids: &[i32]) -> Vec<Blocker> {
    const KINDS: [&str; 8] = ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time"];
    let of = |pid: i32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    let Ok(own) = KINDS.iter().map(|kind| of(init, kind)).collect::<io::Result<Vec<_>>>() else {
        return Vec::new();
    };
    let mut blockers = Vec::new();
    for &pid in pids {
        let differs = |(kind, own): &(&&str, _)| of(pid, kind).is_ok_and(|it| it != *own);
        let kinds: Vec<&str> =
            KINDS.iter().zip(own.iter().cloned()).filter(differs).map(|(kind, _)| *kind).collect();
        if !kinds.is_empty() {
            blockers.push(Blocker {
                pid: inner_pid(pid).unwrap_or(pid),
                command: command(pid),
                fd: None,
                object: format!("{} namespace of its own", kinds.join(", ")),
                hint: "stop the service, or let it run without isolation of its own".to_owned(),
            });
        }
    }
    blockers
}

/// A process's number in its own pid namespace.
fn inner_pid(pid: i32) -> Option<i32> {
    let status = read_proc(&format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

fn command(pid: i32) -> String {
    read_proc(&format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

fn id_base(map: &str) -> u32 {
    map.split_whitespace().nth(1).and_then(|base| base.parse().ok()).unwrap_or(0)
}

fn names(init: i32) -> io::Result<(String, String)> {
    let process = clone::open_process(init)?;
    namespace::in_names_of(process.as_fd(), || {
        let names = nix::sys::utsname::uname()?;
        let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
        let domain = text(names.domainname());
        let domain = if domain == "(none)" { String::new() } else { domain };
        Ok((text(names.nodename()), domain))
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

/// An order in which every mount can be attached by its path: parents before what is on them,
/// and of the mounts on one parent the deeper first, because one further up would hide it.
fn attach_order(lines: &[Line]) -> Vec<usize> {
    fn visit(lines: &[Line], index: usize, order: &mut Vec<usize>) {
        order.push(index);
        let mut below: Vec<usize> = (0..lines.len())
            .filter(|&other| other != index && lines[other].parent == lines[index].id)
            .collect();
        below.sort_by_key(|&other| std::cmp::Reverse(lines[other].point.matches('/').count()));
        for other in below {
            // A damaged table could be a loop.
            if !order.contains(&other) {
                visit(lines, other, order);
            }
        }
    }
    let mut order = Vec::new();
    let top = lines.iter().position(|line| !lines.iter().any(|other| other.id == line.parent));
    if let Some(top) = top {
        visit(lines, top, &mut order);
    }
    order
}

struct Reader {
    base: u32,
    root: File,
    plan: Plan,
    /// The device number of each file system of the plan.
    devices: Vec<String>,
    blockers: Vec<Blocker>,
}

impl Reader {
    fn mount(&mut self, lines: &[Line], line: &Line) {
        if let Some(reason) = self.unsupported(lines, line) {
            self.block(line, reason);
            return;
        }
        let metadata = self.look(&line.point);
        let rdev = metadata.as_ref().filter(|it| it.mode() & libc::S_IFMT == libc::S_IFCHR);
        let (kind, root) = match rdev {
            Some(node) => {
                let (major, minor) =
                    (nix::sys::stat::major(node.rdev()), nix::sys::stat::minor(node.rdev()));
                let known = HOST_DEVICES
                    .iter()
                    .find(|(_, a, b)| (u64::from(*a), u64::from(*b)) == (major, minor));
                let Some((name, ..)) = known else {
                    self.block(line, format!("device {major}:{minor}"));
                    return;
                };
                (FilesystemKind::Device { name: (*name).to_owned() }, "/".to_owned())
            }
            None => match self.kind(line) {
                Ok(FilesystemKind::Cgroup) => (FilesystemKind::Cgroup, cgroup_root(lines, line)),
                Ok(kind) => (kind, line.root.clone()),
                Err(reason) => return self.block(line, reason),
            },
        };
        let Some(filesystem) = self.filesystem(line, kind) else {
            return self.block(line, "an id outside of those of the VE in its options".to_owned());
        };
        self.plan.mounts.push(Mount {
            point: line.point.clone(),
            filesystem,
            root,
            directory: metadata.is_none_or(|it| it.is_dir()),
            attributes: attributes(&line.options),
            shared: line.shared.is_some(),
        });
    }

    fn unsupported(&self, lines: &[Line], line: &Line) -> Option<String> {
        if line.master.is_some() {
            return Some("a mount that follows another one (slave)".to_owned());
        }
        let peers = line
            .shared
            .map_or(0, |group| lines.iter().filter(|other| other.shared == Some(group)).count());
        if peers > 1 {
            return Some("a mount that is shared with another one".to_owned());
        }
        line.root.ends_with("//deleted").then(|| "a mount of a deleted file".to_owned())
    }

    fn kind(&self, line: &Line) -> Result<FilesystemKind, String> {
        let main = self.devices.first().is_none_or(|device| *device == line.device);
        match line.kind.as_str() {
            "overlay" if main => Ok(FilesystemKind::Root),
            "tmpfs" => Ok(FilesystemKind::Tmpfs),
            "proc" => Ok(FilesystemKind::Proc),
            "sysfs" => Ok(FilesystemKind::Sysfs),
            "devpts" => Ok(FilesystemKind::Devpts),
            "mqueue" => Ok(FilesystemKind::Mqueue),
            "cgroup2" => Ok(FilesystemKind::Cgroup),
            other => Err(format!("file system of type {other}")),
        }
    }

    /// The number of the line's file system in the plan, added there if it is new.
    fn filesystem(&mut self, line: &Line, kind: FilesystemKind) -> Option<u32> {
        let device = matches!(kind, FilesystemKind::Device { .. });
        let known = self.devices.iter().position(|it| *it == line.device);
        let index = match known.filter(|_| !device) {
            Some(index) => index,
            None => {
                let options = match kind {
                    FilesystemKind::Tmpfs | FilesystemKind::Devpts | FilesystemKind::Proc => {
                        self.options(&line.super_options)?
                    }
                    _ => Vec::new(),
                };
                self.plan.filesystems.push(Filesystem { kind, options });
                // Device nodes of the host share one file system there; here each stands alone.
                let name = if device { String::new() } else { line.device.clone() };
                self.devices.push(name);
                self.devices.len() - 1
            }
        };
        u32::try_from(index).ok()
    }

    /// The options of a file system with the ids as the VE sees them. `None` for a foreign id.
    fn options(&self, options: &str) -> Option<Vec<MountOption>> {
        let mut found = Vec::new();
        for option in options.split(',') {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let value = match (name, value) {
                ("rw" | "newinstance" | "relatime", _) => continue,
                ("uid" | "gid", Some(id)) => {
                    let id = id.parse::<u32>().ok()?.checked_sub(self.base)?;
                    Some((id < ID_COUNT).then(|| id.to_string())?)
                }
                (_, value) => value.map(str::to_owned),
            };
            found.push(MountOption { name: name.to_owned(), value });
        }
        Some(found)
    }

    fn look(&self, point: &str) -> Option<std::fs::Metadata> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let fd = openat2(&self.root, point, how).ok()?;
        File::from(fd).metadata().ok()
    }

    fn block(&mut self, line: &Line, object: String) {
        self.blockers.push(Blocker {
            pid: 1,
            command: "init".to_owned(),
            fd: None,
            object: format!("{object} mounted on {}", line.point),
            hint: format!("unmount {} inside the VE", line.point),
        });
    }
}

/// The part of the cgroup tree that a mount shows, from what the VE sees as the top. The host
/// reads the path from its own top; the VE's is what its widest mount shows.
fn cgroup_root(lines: &[Line], line: &Line) -> String {
    let roots = lines.iter().filter(|it| it.kind == "cgroup2").map(|it| it.root.as_str());
    let top = roots.min_by_key(|root| root.len()).unwrap_or("/");
    match line.root.strip_prefix(top) {
        None | Some("") => "/".to_owned(),
        Some(rest) if rest.starts_with('/') => rest.to_owned(),
        Some(_) => line.root.clone(),
    }
}

fn attributes(options: &str) -> u64 {
    let mut bits = 0;
    for option in options.split(',') {
        bits |= match option {
            "ro" => attribute::RDONLY,
            "nosuid" => attribute::NOSUID,
            "nodev" => attribute::NODEV,
            "noexec" => attribute::NOEXEC,
            "noatime" => attribute::NOATIME,
            "nodiratime" => attribute::NODIRATIME,
            "nosymfollow" => attribute::NOSYMFOLLOW,
            _ => 0,
        };
    }
    // The kernel shows relatime as a word and strictatime as the absence of any.
    if !options.split(',').any(|option| option == "relatime" || option == "noatime") {
        bits |= attribute::STRICTATIME;
    }
    bits
}
