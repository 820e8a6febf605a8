//! Trees of mounts in several namespaces are read and made again.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
};

use crate::bench::{Bench, seed};
use ckpt_engine::{
    container::{Container, capture},
    procfs,
    sys::namespace::in_mounts_of,
};
use nix::sys::wait::WaitStatus;

/// The mounts of several namespaces in words that do not depend on when they were made.
fn told(tables: &[String]) -> Vec<String> {
    let mut lines: Vec<(String, Vec<String>)> = Vec::new();
    for (number, table) in tables.iter().enumerate() {
        for line in table.lines() {
            let (front, back) = line.split_once(" - ").expect("a mount");
            let front: Vec<&str> = front.split(' ').collect();
            let back: Vec<&str> = back.split(' ').collect();
            let known = format!("{number} {} {} {} {}", front[4], back[0], front[3], front[5]);
            let known = format!("{known} {}", back[1..].join(" "));
            lines.push((known, front[6..].iter().map(|word| (*word).to_owned()).collect()));
        }
    }
    lines.sort();
    let mut groups = HashMap::new();
    let mut told = Vec::new();
    for (known, words) in lines {
        let mut line = known;
        for word in words {
            let (kind, group) = word.split_once(':').unwrap_or((&word, "0"));
            let next = groups.len();
            let number = groups.entry(group.to_owned()).or_insert(next);
            line = format!("{line} {kind}:{number}");
        }
        told.push(line);
    }
    told
}

fn table_of(namespace: &OwnedFd) -> String {
    let proc = OwnedFd::from(File::open("/proc").expect("/proc"));
    in_mounts_of(namespace, || {
        let flags = nix::fcntl::OFlag::O_RDONLY;
        let mode = nix::sys::stat::Mode::empty();
        let mut file = File::from(nix::fcntl::openat(&proc, "thread-self/mountinfo", flags, mode)?);
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    })
    .expect("a mount table")
}

const MAIN: &str = "
    mkdir -p /a /b /c /d /e /f /g /over
    mount -t tmpfs -o mode=711,size=1m a /a && mkdir -p /a/x/deep /a/y
    mount -t ramfs -o mode=700 r /g
    mount --bind /a/x /b && mount --make-slave /b
    mount --bind /a /c && mount --make-private /c
    mount --make-rshared /
    mount --bind /a/y /d
    mount --make-slave /d && mount --make-shared /d
    mount -o bind,ro,nosuid /tmp /e
    mount --make-unbindable /e
    echo x > /a/file && echo > /f/point
    mount --bind /a/file /f/point
    mount -t proc -o hidepid=invisible p /over
    mount -t tmpfs under /over && mkdir /over/in && mount -t tmpfs in /over/in
    mount -t tmpfs -o ro top /over";

const NESTED: &str = "
    mount --make-rslave / && mount --make-rshared /
    mount -t tmpfs -o size=8k own /tmp && mkdir /tmp/mine
    mount --bind /tmp/mine /run/lock
    mount -o remount,bind,ro /e
    mount --make-rslave /b
    echo ready > /a/x/ready
    while :; do sleep 1000; done";

#[test]
fn mounts_of_several_namespaces_are_made_again_with_their_groups() {
    let bench = Bench::new();
    let init = bench.start("while :; do sleep 1000; done");
    let (output, status) = bench.run(&init, &format!("set -e; {MAIN}"));
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{output}");
    let nested = format!(
        "unshare -m -u --propagation unchanged sh -ec '{NESTED}' > /dev/null 2>&1 < /dev/null &
         while ! [ -s /a/x/ready ]; do :; done"
    );
    let (output, _) = bench.run(&init, &nested);
    assert_eq!(output, "");
    let pids = procfs::cgroup_processes(&bench.cgroup).unwrap();
    let found = capture(init.pid, &pids).unwrap().unwrap();
    assert_eq!(found.plan.nested.mounts.len(), 1);
    assert_eq!(found.plan.nested.names.len(), 1);
    let original: Vec<String> = found.spaces.mount_namespaces().iter().map(table_of).collect();
    assert!(found.spaces.mounts().unwrap().is_some_and(|mounts| mounts.len() > 40));

    let again = Bench::new();
    let mut spec = again.spec(found.plan.clone());
    spec.links = Vec::new();
    let container = Container::create(&spec, seed()).unwrap();
    let own = OwnedFd::from(File::open(format!("/proc/{}/ns/mnt", container.init)).unwrap());
    let copy: Vec<String> =
        std::iter::once(&own).chain(&container.nested.mounts).map(table_of).collect();
    // Each has a cgroup of its own, by which the host calls the top of the tree.
    let cgroup = |bench: &Bench| {
        let name = bench.cgroup.file_name().unwrap();
        format!("/{}/ve", name.to_str().unwrap())
    };
    let original: Vec<String> =
        original.iter().map(|it| it.replace(&cgroup(&bench), &cgroup(&again))).collect();
    let strip = |lines: Vec<String>| {
        let overlay = |line: &String| !line.contains(" overlay ");
        lines.into_iter().filter(overlay).collect::<Vec<_>>()
    };
    let (original, copy) = (strip(told(&original)), strip(told(&copy)));
    for (left, right) in original.iter().zip(&copy) {
        // A file system in memory becomes read-only when it is complete.
        assert_eq!(left.replace(" ro,", " rw,"), right.replace(" ro,", " rw,"));
    }
    assert_eq!(original.len(), copy.len());

    // What is mounted in the container now comes up in the nested namespace, too.
    let namespace = &container.nested.mounts[0];
    in_mounts_of(&own, || {
        Ok(nix::mount::mount(
            Some("new"),
            "/d",
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )?)
    })
    .unwrap();
    let below = table_of(namespace);
    assert!(below.lines().any(|line| line.contains(" /d ") && line.contains("new")), "{below}");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap().matches(" new ").count(), 0);
}

#[test]
fn a_change_of_the_mounts_is_noticed() {
    let bench = Bench::new();
    let init = bench.start("while :; do sleep 1000; done");
    let found = capture(init.pid, &[init.pid]).unwrap().unwrap();
    assert!(found.spaces.mounts().unwrap().is_some());
    let (output, _) = bench.run(&init, "mount -t tmpfs x /tmp");
    assert_eq!(output, "");
    assert!(found.spaces.mounts().unwrap().is_none());
}
