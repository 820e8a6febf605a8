//! The testbed's part of the machine's cgroups.
//!
//! Every process of a testbed is in one cgroup2 subtree, daemons, VEs and commands on hosts
//! alike, so that one write ends them all. Limits of VEs may live in v1 hierarchies; the daemons
//! make those, and they are removed here.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    TestbedError,
    names::{Host, Layout},
    state::State,
    system,
};

/// How long processes that were killed, and the cgroups they were in, may take to go away.
const PATIENCE: Duration = Duration::from_secs(30);

/// The cgroup of commands on hosts.
const COMMANDS: &str = "commands";

/// Makes the cgroups of the testbed.
pub(super) fn make(layout: &Layout, state: &State) -> Result<(), TestbedError> {
    let mount = unified_mount()?;
    let top = mount.join(layout.cgroup());
    fs::create_dir_all(&top).map_err(system("make", &top))?;
    let mut parents = vec![mount, top.clone()];
    for node in state.nodes() {
        let of_node = top.join(node.to_string());
        let of_daemon = of_node.join("daemon");
        fs::create_dir_all(&of_daemon).map_err(system("make", &of_daemon))?;
        parents.push(of_node);
    }
    let commands = top.join(COMMANDS);
    fs::create_dir_all(&commands).map_err(system("make", &commands))?;
    for parent in parents {
        delegate(&parent);
    }
    Ok(())
}

/// The cgroup below which a node's daemon puts its VEs, below each hierarchy's mount.
pub(super) fn of_ves(layout: &Layout, node: &Host) -> String {
    format!("{}/{node}/ve", layout.cgroup())
}

/// Where a node's daemon itself belongs.
pub(super) fn of_daemon(layout: &Layout, node: &Host) -> Result<PathBuf, TestbedError> {
    Ok(unified_mount()?.join(layout.cgroup()).join(node.to_string()).join("daemon"))
}

/// Makes a process, and what it starts from now on, end with the testbed.
pub(super) fn adopt(layout: &Layout, pid: u32) -> Result<(), TestbedError> {
    let file = unified_mount()?.join(layout.cgroup()).join(COMMANDS).join("cgroup.procs");
    match fs::write(&file, pid.to_string()) {
        // It has ended already.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result.map_err(system("write", file)),
    }
}

/// Ends every process of the testbed and removes its cgroups.
pub(super) fn remove(layout: &Layout) -> Result<(), TestbedError> {
    let top = unified_mount()?.join(layout.cgroup());
    // Killed again before each attempt: a process may just have been on its way in.
    remove_tree(&top, || kill(&top))?;
    v1_places(layout).iter().try_for_each(|place| remove_tree(place, || Ok(())))
}

fn kill(top: &Path) -> Result<(), TestbedError> {
    let order = top.join("cgroup.kill");
    let events = top.join("cgroup.events");
    let deadline = Instant::now() + PATIENCE;
    loop {
        // A frozen VE dies as well: SIGKILL is delivered to frozen processes. Said again each
        // time, because a process that was on its way in has not heard it.
        fs::write(&order, "1").map_err(system("write", &order))?;
        // Opened anew each time: a read at the end of the file would say nothing.
        let file = fs::File::open(&events).map_err(system("open", &events))?;
        let text = io::read_to_string(&file).map_err(system("read", &events))?;
        if !text.contains("populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TestbedError::Stuck {
                what: "the processes of the cgroup",
                name: top.display().to_string(),
            });
        }
        let wait = PollTimeout::try_from(left.min(Duration::from_millis(100)))
            .expect("a tenth of a second fits");
        let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        // A signal only makes us look again.
        let _ = poll(&mut files, wait);
    }
}

/// Removes a cgroup and those below it. One whose last process has just ended stays busy for a
/// moment, and nothing tells when the moment is over.
fn remove_tree(
    top: &Path,
    clear: impl Fn() -> Result<(), TestbedError>,
) -> Result<(), TestbedError> {
    let deadline = Instant::now() + PATIENCE;
    while top.exists() {
        clear()?;
        match remove_once(top) {
            Ok(()) => break,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() > deadline {
                    let name = top.display().to_string();
                    return Err(TestbedError::Stuck { what: "the cgroup", name });
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(system("remove", top)(error)),
        }
    }
    Ok(())
}

fn remove_once(top: &Path) -> io::Result<()> {
    for entry in fs::read_dir(top)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_once(&entry.path())?;
        }
    }
    fs::remove_dir(top)
}

/// Lets cgroups below `parent` have limits, where this kernel has controllers in cgroup2.
fn delegate(parent: &Path) {
    let available = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if ["cpu", "cpuset", "io", "memory", "pids"].contains(&controller) {
            // Refused where the machine's own manager does not share: then there is no limit.
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

fn unified_mount() -> Result<PathBuf, TestbedError> {
    let missing = || {
        let source = io::Error::from(io::ErrorKind::NotFound);
        TestbedError::System { what: "find a mount of", path: "cgroup2".into(), source }
    };
    mounts_of("cgroup2").into_iter().next().ok_or_else(missing)
}

/// Where a daemon may have put cgroups of v1 hierarchies: below the mount, or below the cgroup
/// in which this program runs.
fn v1_places(layout: &Layout) -> Vec<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut below: Vec<&str> = own.lines().filter_map(|line| line.splitn(3, ':').nth(2)).collect();
    below.push("/");
    below.sort_unstable();
    below.dedup();
    mounts_of("cgroup")
        .iter()
        .flat_map(|mount| {
            below.iter().map(|own| mount.join(own.trim_start_matches('/')).join(layout.cgroup()))
        })
        .collect()
}

fn mounts_of(kind: &str) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            (after.split(' ').next() == Some(kind)).then(|| before.split(' ').nth(4))?
        })
        .map(PathBuf::from)
        .collect()
}
