//! Namespaces that are held open.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use ckpt_engine::sys::program::descriptor::namespace_kind;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

const KINDS: [(&str, i32); 9] = [
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("ipc", libc::CLONE_NEWIPC),
    ("mnt", libc::CLONE_NEWNS),
    ("net", libc::CLONE_NEWNET),
    ("pid", libc::CLONE_NEWPID),
    ("pid_for_children", libc::CLONE_NEWPID),
    ("time", 0x80),
    ("user", libc::CLONE_NEWUSER),
    ("uts", libc::CLONE_NEWUTS),
];

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let open = |kind: &str| File::open(format!("/proc/self/ns/{kind}"));
    let mut held = KINDS.map(|(kind, _)| open(kind)).into_iter().collect::<Result<Vec<_>, _>>()?;
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            held.swap(0, 3);
        }
        for ((name, kind), held) in KINDS.iter().zip(&held) {
            same("the kind of a namespace", namespace_kind(held.as_fd())?, *kind)?;
            let now = fs::metadata(format!("/proc/self/ns/{name}"))?.ino();
            same("the namespace that we are in", held.metadata()?.ino(), now)?;
        }
    }
    Ok(())
}
