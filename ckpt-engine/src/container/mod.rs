//! Containers: the namespaces, mounts and names around a VE's processes.
//!
//! A [`Container`] is made by a *seed*: the caller's own program run again, single-threaded,
//! with nothing but a socket, which enters [`seed_main`]. It unshares what must be its own, makes
//! the container's pid 1 as a sibling of itself (so a child of the daemon) and goes away. pid 1
//! attaches the mounts and then waits on its channel: a fresh container gets its init there
//! ([`Container::exec_init`]); for a restored one the engine attaches to it with ptrace instead,
//! and never sends anything. A pid 1 whose daemon dies before either ends by itself.
//!
//! While it waits, pid 1 has all signals at their defaults but SIGCHLD, which it ignores, and no
//! descriptor but the channel as number 3. It never depends on the daemon afterwards.

mod bench;
mod capture;
pub mod cgroups;
mod devices;
mod enter;
mod error;
mod groups;
mod late;
mod layers;
mod limits;
mod mountinfo;
mod mounts;
mod nested;
mod numbered;
mod order;
mod overlay;
mod place;
mod refused;
mod roots;
mod seed;
mod spaces;
mod sysfs;
mod table;
mod users;

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::{Child, Command},
};

use ckpt_format::container::{Clocks, Container as Plan, Waiting, parts};
use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, socketpair},
    wait::{Id, WaitPidFlag, WaitStatus, waitid},
};

pub(crate) use self::mountinfo::binary_formats;
pub use self::{
    bench::Bench,
    capture::{Captured, Found, capture, clock_offsets, clocks_now, date, host_clocks},
    enter::{Entered, Entry, Program, enter, open_terminal},
    error::ContainerError,
    late::LateMount,
    nested::Handles,
    overlay::Layers,
    seed::seed_main,
    spaces::{Spaces, foreign_namespaces},
};
pub(crate) use self::{
    capture::offset_lines,
    late::{Site, mount_late},
    limits::DROPPED,
    refused::BASELINE_FILTERS,
    users::IdRanges,
};
use self::{
    error::step,
    order::{Order, Reply, Socket},
};

/// The number of ids that a container has for its users and groups.
pub const ID_COUNT: u32 = 65_536;

/// What to make.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Names, clocks, file systems and mounts.
    pub plan: Plan,
    /// Symbolic links to make where they are missing once all is mounted: name, target.
    pub links: Vec<(String, String)>,
    /// The host id that root inside stands for.
    pub id_base: u32,
    /// How far the clocks inside are ahead of the host's; `None` is not at all.
    pub clock_offsets: Option<Clocks>,
    /// The files of the root.
    pub layers: Layers,
    /// The cgroup directories that pid 1 starts in. What the one in the cgroup v2 hierarchy
    /// is becomes the root of the cgroup tree that the container sees.
    pub cgroups: Vec<PathBuf>,
}

/// A file system of a container, or a part of one, as a detached mount from its own top: nothing
/// mounted inside the container hides any of it.
#[derive(Debug)]
pub struct Tree {
    /// The place of the file system in [`Plan::filesystems`].
    pub filesystem: usize,
    /// Which of the [`parts`] of the plan it is; `None` for the
    /// container's own files.
    pub part: Option<usize>,
    /// The mount.
    pub mount: OwnedFd,
}

/// A container whose pid 1 waits for what it is to become.
///
/// Dropping it kills everything inside.
#[derive(Debug)]
pub struct Container {
    /// pid 1, as the daemon numbers it.
    pub init: i32,
    /// A descriptor for pid 1.
    pub pidfd: OwnedFd,
    /// The daemon's end of pid 1's descriptor 3.
    pub channel: OwnedFd,
    /// The root and the files in memory.
    pub trees: Vec<Tree>,
    /// The namespaces that are there for programs inside.
    pub nested: Handles,
    armed: bool,
}

impl Container {
    /// Makes a container. `seed` is the program that calls [`seed_main`].
    pub fn create(spec: &Spec, seed: Command) -> Result<Self, ContainerError> {
        let (socket, child) = spawn_seed(seed)?;
        let child = Reaped(child);
        place(child.0.id().cast_signed(), &spec.cgroups)?;
        let (channel, inner) = pair(SockType::SeqPacket).map_err(step("make a channel"))?;
        let order = Order::Create {
            plan: Box::new(spec.plan.clone()),
            links: spec.links.clone(),
            clock_offsets: spec.clock_offsets,
        };
        socket.send(&order, &[inner.as_fd()])?;
        drop(inner);
        match socket.receive::<Reply>()?.0 {
            Reply::Unshared => (),
            other => return Err(other.into_error("unshared")),
        }
        let seed_pid = child.0.id();
        map_ids(seed_pid, spec.id_base)?;
        let users = File::open(format!("/proc/{seed_pid}/ns/user"))
            .map_err(step("open the user namespace"))?;
        let [root, view] = spec.layers.mount(users.as_fd(), spec.id_base)?;
        let devices = devices::make().map_err(step("make device nodes"))?;
        socket.send(&Order::Mapped, &[root.as_fd(), devices.as_fd()])?;
        drop((root, devices));
        let (born, mut early) = receive_born(&socket)?;
        let mut this = match born {
            (Reply::Born { pid }, mut descriptors) => {
                let pidfd = descriptors.pop().ok_or(ContainerError::Foreign)?;
                let (trees, nested) = Default::default();
                Self { init: pid, pidfd, channel, trees, nested, armed: true }
            }
            (other, _) => return Err(other.into_error("born")),
        };
        let seed = needed(child, &spec.plan)?;
        let mut received = Vec::new();
        let mut hear = || early.pop_front().map_or_else(|| socket.receive::<Reply>(), Ok);
        let mut next = hear()?;
        while let (Reply::Descriptors, some) = next {
            received.extend(some);
            next = hear()?;
        }
        let Reply::Ready { trees, nested, late } = next.0 else {
            return Err(next.0.into_error("ready"));
        };
        let waiting = received.len().checked_sub(late).map(|at| received.split_off(at));
        let waiting = waiting.ok_or(ContainerError::Foreign)?;
        let mut received = received.into_iter();
        let root = spec.plan.root_filesystem().unwrap_or(0);
        this.trees.push(Tree { filesystem: root, part: None, mount: view });
        let wanted = parts(&spec.plan).map_err(|_| ContainerError::Foreign)?;
        for (index, part) in wanted.iter().enumerate().take(trees) {
            let mount = received.next().ok_or(ContainerError::Foreign)?;
            this.trees.push(Tree { filesystem: part.filesystem, part: Some(index), mount });
        }
        this.nested = Handles::from_counted(nested, received).ok_or(ContainerError::Foreign)?;
        let nested = &spec.plan.nested;
        this.nested.pid_owners.clone_from(&nested.owners.pids);
        this.nested.times.clone_from(&nested.times);
        this.nested.user_parents = nested.users.iter().map(|users| users.parent).collect();
        let late = LateMount::collect(&spec.plan, waiting);
        this.nested.late = late.ok_or(ContainerError::Foreign)?;
        this.nested.waiting = Waiting::of(&spec.plan);
        this.nested.bench = seed.map(|seed| Bench::new(socket, seed));
        let channel = this.channel.try_clone().map_err(step("copy the channel"))?;
        match Socket::new(channel).receive::<Reply>()?.0 {
            Reply::Alone => Ok(this),
            other => Err(other.into_error("alone")),
        }
    }

    /// Runs a program as the container's init. It starts with an empty environment but `env`,
    /// its own session, and a console that takes everything and says nothing.
    pub fn exec_init(
        mut self,
        arguments: &[String],
        environment: &[(String, String)],
    ) -> Result<Init, ContainerError> {
        let channel = self.channel.try_clone().map_err(step("copy the channel"))?;
        let channel = Socket::new(channel);
        let order = Order::Init { arguments: arguments.into(), environment: environment.into() };
        channel.send(&order, &[])?;
        match channel.receive::<Reply>() {
            // The channel is closed by the exec itself.
            Err(ContainerError::Gone) => (),
            Err(other) => return Err(other),
            Ok((other, _)) => return Err(other.into_error("exec")),
        }
        let pidfd = self.pidfd.try_clone().map_err(step("copy the pidfd"))?;
        if ended(pidfd.as_fd()) {
            return Err(ContainerError::Gone);
        }
        self.armed = false;
        Ok(Init { pid: self.init, pidfd })
    }

    /// Gives the container up to its own life: dropping it no longer kills it.
    pub fn release(mut self) -> Result<Init, ContainerError> {
        let pidfd = self.pidfd.try_clone().map_err(step("copy the pidfd"))?;
        self.armed = false;
        Ok(Init { pid: self.init, pidfd })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.armed {
            // All other processes of a pid namespace die with its pid 1.
            let _ = crate::sys::clone::signal_process(self.pidfd.as_fd(), libc::SIGKILL);
            let _ = waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
    }
}

/// pid 1 of a container that lives its own life.
#[derive(Debug)]
pub struct Init {
    /// Its number as the daemon sees it.
    pub pid: i32,
    /// A descriptor for it.
    pub pidfd: OwnedFd,
}

/// True once the process behind a pidfd has ended.
pub fn ended(pidfd: std::os::fd::BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut set = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut set, PollTimeout::ZERO), Ok(1))
}

/// Collects the exit status of an ended child of ours; `None` for somebody else's child.
pub fn reap(pidfd: std::os::fd::BorrowedFd<'_>) -> Option<WaitStatus> {
    waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED).ok()
}

/// A seed that is always waited for, and killed if it still runs.
#[derive(Debug)]
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It has ended when all went well; then this does nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the end of a seed, unless overlays are to be made by it.
fn needed(mut seed: Reaped, plan: &Plan) -> Result<Option<Reaped>, ContainerError> {
    if plan.has_overlays() {
        return Ok(Some(seed));
    }
    seed.0.wait().map_err(step("wait for the seed"))?;
    Ok(None)
}

/// A reply with its descriptors.
type Received = (Reply, Vec<OwnedFd>);

/// Waits until the seed tells which process it has made. On a busy host that process may be
/// faster with words of its own, which are then the second value.
fn receive_born(socket: &Socket) -> Result<(Received, VecDeque<Received>), ContainerError> {
    let mut early: VecDeque<Received> = VecDeque::new();
    loop {
        match socket.receive::<Reply>() {
            Ok(born @ (Reply::Born { .. }, _)) => return Ok((born, early)),
            Ok(other) => early.push_back(other),
            // The seed itself gave up: the first is all that it had to say.
            Err(error) => match early.pop_front() {
                Some((said, _)) => return Err(said.into_error("born")),
                None => return Err(error),
            },
        }
    }
}

fn pair(kind: SockType) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Starts the seed with its end of a socket as standard input.
fn spawn_seed(mut seed: Command) -> Result<(Socket, Child), ContainerError> {
    let (ours, theirs) = pair(SockType::SeqPacket).map_err(step("make a socket"))?;
    // The daemon's environment is no business of the container.
    let child = seed.env_clear().stdin(theirs).spawn().map_err(step("start the seed"))?;
    Ok((Socket::new(ours), child))
}

/// Moves a process into cgroups.
fn place(pid: i32, cgroups: &[PathBuf]) -> Result<(), ContainerError> {
    for cgroup in cgroups {
        std::fs::write(cgroup.join("cgroup.procs"), pid.to_string())
            .map_err(|source| ContainerError::Cgroup { path: cgroup.clone(), source })?;
    }
    Ok(())
}

fn map_ids(pid: u32, base: u32) -> Result<(), ContainerError> {
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{map}"), format!("0 {base} {ID_COUNT}"))
            .map_err(step("map the ids"))?;
    }
    Ok(())
}

/// Reads a small file of `/proc` as text.
fn read_proc(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}
