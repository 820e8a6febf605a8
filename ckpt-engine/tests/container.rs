//! Containers are made, entered, read and made again. Needs root and a cgroup v2 hierarchy.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use ckpt_engine::container::{
    Container, Entry, Init, Layers, Program, Spec, capture, enter, foreign_namespaces, host_clocks,
    reap,
};
use ckpt_format::container::{Clocks, Container as Plan, FRESH_LINKS, FilesystemKind};
use nix::sys::wait::WaitStatus;

const ID_BASE: u32 = 1_000_000;
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A root with a shell and a few programs, and a cgroup; both go away with it.
struct Bench {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["lower", "store/upper", "store/work"] {
            fs::create_dir_all(directory.path().join(name)).expect("a layer");
        }
        let lower = directory.path().join("lower");
        for program in ["/bin/sh", "/bin/cat", "/bin/sleep", "/usr/bin/id", "/bin/mount"] {
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

    fn spec(&self, plan: Plan) -> Spec {
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

    fn start(&self, script: &str) -> Init {
        let container = Container::create(&self.spec(Plan::fresh("ve")), seed()).expect("create");
        let arguments = ["/bin/sh", "-c", script].map(str::to_owned);
        container.exec_init(&arguments, &[("PATH".into(), "/bin:/usr/bin".into())]).expect("init")
    }

    /// Runs a shell script in the container: what it printed, and how it ended.
    fn run(&self, init: &Init, script: &str) -> (String, WaitStatus) {
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

fn seed() -> Command {
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

#[test]
fn a_fresh_container_is_a_machine_of_its_own() {
    let bench = Bench::new();
    let init = bench.start("echo 1 > /made; while :; do sleep 1000; done");
    let (output, status) = bench.run(&init, "id -u; echo $$; cat /proc/1/comm; cat /proc/sys/kernel/hostname; cat /proc/self/cgroup | (read x; echo $x); echo > /dev/null && echo null; exit 7");
    let lines: Vec<_> = output.lines().collect();
    assert!(matches!(status, WaitStatus::Exited(_, 7)), "{status:?} {output}");
    assert_eq!(lines[0], "0");
    assert!(lines[1].parse::<i32>().unwrap() < 20, "{output}");
    assert_eq!(lines[2..4], ["sh", "ve"]);
    assert!(lines.contains(&"null"), "{output}");
    // Root inside is nobody outside, and its files are plain in the layer.
    let status = fs::metadata(format!("/proc/{}", init.pid)).unwrap();
    assert_eq!(status.uid(), ID_BASE);
    let (_, made) = bench.run(&init, "echo > /tmp/file");
    assert!(matches!(made, WaitStatus::Exited(_, 0)));
    let upper = bench.directory.path().join("store/upper/tmp/file");
    assert_eq!(fs::metadata(upper).unwrap().uid(), 0);
}

#[test]
fn a_container_that_nobody_wants_is_gone() {
    let bench = Bench::new();
    let container = Container::create(&bench.spec(Plan::fresh("ve")), seed()).unwrap();
    let init = container.init;
    let descriptors: Vec<_> = fs::read_dir(format!("/proc/{init}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(descriptors, ["3"]);
    drop(container);
    assert!(!Path::new(&format!("/proc/{init}")).exists());
}

#[test]
fn a_waiting_container_ends_with_its_channel() {
    let bench = Bench::new();
    let container = Container::create(&bench.spec(Plan::fresh("ve")), seed()).unwrap();
    let pidfd = container.pidfd.try_clone().unwrap();
    let nothing: OwnedFd = File::open("/dev/null").unwrap().into();
    let mut container = container;
    drop(std::mem::replace(&mut container.channel, nothing));
    assert!(matches!(reap(pidfd.as_fd()), Some(WaitStatus::Exited(..))));
}

#[test]
fn a_missing_init_is_told() {
    let bench = Bench::new();
    let container = Container::create(&bench.spec(Plan::fresh("ve")), seed()).unwrap();
    let problem = container.exec_init(&["/no/such/init".into()], &[]).unwrap_err();
    assert!(problem.to_string().contains("run init"), "{problem}");
}

#[test]
fn what_was_captured_is_made_again() {
    let bench = Bench::new();
    let init = bench.start("while :; do sleep 1000; done");
    let script = "mkdir /extra 2>/dev/null; mount -t tmpfs -o size=64k,mode=700 x /run/lock && \
                  mount --bind /dev/null /tmp/null";
    fs::write(bench.directory.path().join("store/upper/tmp.txt"), "x").unwrap();
    let (output, _) = bench.run(&init, &format!("echo > /tmp/null; {script}"));
    assert_eq!(output, "");
    let plan = capture(init.pid).unwrap().unwrap();
    let again = Bench::new();
    let mut spec = again.spec(plan.clone());
    spec.links = Vec::new();
    let container = Container::create(&spec, seed()).unwrap();
    let tmpfs =
        |plan: &Plan| plan.filesystems.iter().filter(|it| it.kind == FilesystemKind::Tmpfs).count();
    assert_eq!(container.trees.len(), tmpfs(&plan) + 1);
    let copy = capture(container.init).unwrap().unwrap();
    assert_eq!(Plan { clocks: plan.clocks, ..copy }, plan);
}

#[test]
fn clocks_run_as_far_ahead_as_asked() {
    let bench = Bench::new();
    let hour = Clocks { monotonic_ns: 3_600_500_000_000, boottime_ns: 7_200_000_000_000 };
    let mut spec = bench.spec(Plan::fresh("ve"));
    spec.clock_offsets = Some(hour);
    let container = Container::create(&spec, seed()).unwrap();
    let ahead = capture(container.init).unwrap().unwrap().clocks.since(host_clocks().unwrap());
    let near = |a: i64, b: i64| (a - b).abs() < 1_000_000_000;
    assert!(near(ahead.monotonic_ns, hour.monotonic_ns), "{ahead:?}");
    assert!(near(ahead.boottime_ns, hour.boottime_ns), "{ahead:?}");
}

#[test]
fn what_cannot_be_moved_is_told_at_once() {
    let bench = Bench::new();
    let init = bench.start("while :; do sleep 1000; done");
    let (output, _) = bench.run(
        &init,
        "mount -t ramfs x /run/lock && mount --make-shared /tmp; mount --bind /dev/pts /tmp",
    );
    assert_eq!(output.matches("wrong").count(), 0, "{output}");
    let blockers = capture(init.pid).unwrap().unwrap_err();
    assert!(blockers.iter().any(|it| it.object.contains("ramfs")), "{blockers:?}");
    // This test itself is in none of the container's namespaces.
    let own = std::process::id().cast_signed();
    let foreign = foreign_namespaces(init.pid, &[init.pid, own]);
    assert_eq!(foreign.len(), 1);
    assert!(foreign[0].object.starts_with("user, pid, mnt"), "{foreign:?}");
}

#[test]
fn a_layer_that_is_not_there_is_named() {
    let bench = Bench::new();
    fs::set_permissions(bench.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec = bench.spec(Plan::fresh("ve"));
    spec.layers.lower = bench.directory.path().join("nowhere");
    let problem = Container::create(&spec, seed()).unwrap_err();
    assert!(problem.to_string().contains("nowhere"), "{problem}");
}
