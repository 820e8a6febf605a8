//! A root and a cgroup in which tests make containers.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use ckpt_engine::container::{Container, Entry, Init, Layers, Program, Spec, enter, reap};
use ckpt_format::container::{Container as Plan, FRESH_LINKS};
use nix::sys::wait::WaitStatus;

/// The host id of root inside.
pub(crate) const ID_BASE: u32 = 1_000_000;
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A root with a shell and a few programs, and a cgroup; both go away with it.
#[derive(Debug)]
pub(crate) struct Bench {
    /// Its layers.
    pub(crate) directory: tempfile::TempDir,
    /// Its cgroup, with one more in it for the container.
    pub(crate) cgroup: PathBuf,
}

impl Bench {
    /// A root with nothing running in it.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["lower", "store/upper", "store/work"] {
            fs::create_dir_all(directory.path().join(name)).expect("a layer");
        }
        let lower = directory.path().join("lower");
        for program in [
            "/bin/sh",
            "/bin/cat",
            "/bin/sleep",
            "/usr/bin/id",
            "/bin/mount",
            "/bin/mkdir",
            "/bin/rm",
            "/bin/mv",
            "/usr/bin/unshare",
        ] {
            install(Path::new(program), &lower);
        }
        for name in ["proc", "sys", "dev", "run", "tmp"] {
            fs::create_dir_all(lower.join(name)).expect("a directory");
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ferry-engine-test-{}-{number}", std::process::id());
        let cgroup = cgroup_mount().join(name);
        fs::create_dir_all(cgroup.join("ve")).expect("a cgroup");
        Self { directory, cgroup }
    }

    /// What to make of a plan here.
    pub(crate) fn spec(&self, plan: Plan) -> Spec {
        let store = self.directory.path().join("store");
        Spec {
            plan,
            links: FRESH_LINKS.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect(),
            id_base: ID_BASE,
            clock_offsets: None,
            layers: Layers {
                lower: self.directory.path().join("lower"),
                upper: store.join("upper"),
                work: store.join("work"),
            },
            cgroups: vec![self.cgroup.join("ve")],
        }
    }

    /// A container whose init is this shell script.
    pub(crate) fn start(&self, script: &str) -> Init {
        let container = Container::create(&self.spec(Plan::fresh("ve")), seed()).expect("create");
        let arguments = ["/bin/sh", "-c", script].map(str::to_owned);
        container.exec_init(&arguments, &[("PATH".into(), "/bin:/usr/bin".into())]).expect("init")
    }

    /// Runs a shell script in the container: what it printed, and how it ended.
    pub(crate) fn run(&self, init: &Init, script: &str) -> (String, WaitStatus) {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let null = File::open("/dev/null").expect("/dev/null");
        let program = Program {
            arguments: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            environment: vec![("PATH".into(), "/bin:/usr/bin".into())],
            directory: "/".into(),
            terminal: false,
        };
        let cgroups = [self.cgroup.join("ve")];
        let entry = Entry { init: init.pidfd.as_fd(), cgroups: &cgroups };
        let streams = [null.as_fd(), writer.as_fd(), writer.as_fd()];
        let entered = enter(&entry, &program, streams, seed()).expect("enter");
        drop(writer);
        let mut output = String::new();
        reader.read_to_string(&mut output).expect("output");
        (output, reap(entered.pidfd.as_fd()).expect("our child"))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let gone = || {
            fs::read_to_string(self.cgroup.join("cgroup.events"))
                .is_ok_and(|text| text.contains("populated 0"))
        };
        while !gone() {
            std::thread::yield_now();
        }
        let _ = fs::remove_dir(self.cgroup.join("ve"));
        fs::remove_dir(&self.cgroup).expect("an empty cgroup");
    }
}

/// The program that becomes pid 1.
pub(crate) fn seed() -> Command {
    Command::new(env!("CARGO_BIN_EXE_seed"))
}

fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup v2");
    line.split(' ').nth(4).expect("a mount point").into()
}

/// Copies a program and the libraries that it loads.
fn install(program: &Path, root: &Path) {
    let listing = Command::new("ldd").arg(program).output().expect("ldd");
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    let libraries = listing.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.map(Path::new).chain([program]) {
        let to = root.join(file.strip_prefix("/").expect("absolute"));
        fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        fs::copy(file, &to).expect("a copy");
    }
}
