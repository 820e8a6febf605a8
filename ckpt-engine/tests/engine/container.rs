//! Containers are made, entered, read and made again.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use crate::bench::{Bench, ID_BASE, seed};
use ckpt_engine::container::{Container, capture, foreign_namespaces, host_clocks, reap};
use ckpt_format::container::{Clocks, Container as Plan, FilesystemKind};
use nix::sys::wait::WaitStatus;

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

fn plan_of(init: i32) -> Plan {
    capture(init, &[init]).expect("readable").expect("movable").plan
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
    let plan = plan_of(init.pid);
    let again = Bench::new();
    let mut spec = again.spec(plan.clone());
    spec.links = Vec::new();
    let container = Container::create(&spec, seed()).unwrap();
    let tmpfs =
        |plan: &Plan| plan.filesystems.iter().filter(|it| it.kind == FilesystemKind::Tmpfs).count();
    assert_eq!(container.trees.len(), tmpfs(&plan) + 1);
    let copy = plan_of(container.init);
    assert_eq!(Plan { clocks: plan.clocks, date_ns: plan.date_ns, ..copy }, plan);
}

#[test]
fn clocks_run_as_far_ahead_as_asked() {
    let bench = Bench::new();
    let hour = Clocks { monotonic_ns: 3_600_500_000_000, boottime_ns: 7_200_000_000_000 };
    let mut spec = bench.spec(Plan::fresh("ve"));
    spec.clock_offsets = Some(hour);
    let container = Container::create(&spec, seed()).unwrap();
    let ahead = plan_of(container.init).clocks.since(host_clocks().unwrap());
    let near = |a: i64, b: i64| (a - b).abs() < 1_000_000_000;
    assert!(near(ahead.monotonic_ns, hour.monotonic_ns), "{ahead:?}");
    assert!(near(ahead.boottime_ns, hour.boottime_ns), "{ahead:?}");
}

#[test]
fn what_cannot_be_moved_is_told_at_once() {
    let bench = Bench::new();
    let init = bench.start("while :; do sleep 1000; done");
    let (output, _) =
        bench.run(&init, "echo > /tmp/a; echo > /tmp/b; mount --bind /tmp/a /tmp/b && rm /tmp/a");
    assert_eq!(output, "");
    let blockers = capture(init.pid, &[init.pid]).unwrap().unwrap_err();
    assert!(blockers[0].to_string().contains("deleted file mounted on /tmp/b"), "{blockers:?}");
    // This test itself is in none of the container's namespaces.
    let own = std::process::id().cast_signed();
    let foreign = foreign_namespaces(init.pid, &[init.pid, own]);
    assert_eq!(foreign.len(), 1);
    assert!(foreign[0].object.starts_with("pid"), "{foreign:?}");
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
