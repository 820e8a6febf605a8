//! A process that holds files, their capture, and their rebuild in this process.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{blocker::Blocker, files::Files, memory::SharedKind, process::Descriptor};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};

use super::{Argument, Captured, Holder, Rebuilt, Remote, Source, Target};
use crate::{container::host_clocks, sys, unnamed::Blank};

/// A process that holds descriptors under the numbers that they have in this process.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    pidfd: OwnedFd,
}

impl Child {
    pub(super) fn holding(fds: &[BorrowedFd<'_>]) -> Self {
        let pid = sys::testing::fork_holder(fds).unwrap();
        let pidfd = sys::descriptor::open_process(pid, false).unwrap();
        let child = Self { pid, pidfd };
        // It is ready when it has closed what it does not keep.
        while std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() != fds.len() {
            std::thread::yield_now();
        }
        child
    }

    pub(super) fn holder(&self) -> Holder<'_> {
        Holder {
            host_pid: self.pid,
            named: self.pid,
            pid: 7,
            command: "holder".to_owned(),
            pidfd: self.pidfd.as_fd(),
        }
    }

    pub(super) fn source(&self) -> Source<'_> {
        Source {
            stopped_ns: None,
            processes: vec![self.holder()],
            init: self.pid,
            id_base: 0,
            mounts: None,
            namespaces: std::collections::HashMap::new(),
            networks: Vec::new(),
            ipcs: Vec::new(),
        }
    }

    pub(super) fn capture(&self) -> Captured {
        super::capture(&self.source()).unwrap()
    }

    /// As of a VE that is known to stand still.
    pub(super) fn capture_at_rest(&self) -> Captured {
        let stopped_ns = Some(host_clocks().unwrap().monotonic_ns);
        super::capture(&Source { stopped_ns, ..self.source() }).unwrap()
    }

    pub(super) fn blockers(&self) -> Vec<Blocker> {
        let source = self.source();
        let checked = super::check(&source);
        let refused = super::capture(&source).err().unwrap_or_default();
        assert_eq!(checked, refused, "--check-only and the capture itself must agree");
        checked
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid);
        // It may have been killed by the test already.
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
    }
}

/// The rebuilt files with the numbers that they had in the child.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) rebuilt: Rebuilt,
    table: Vec<Descriptor>,
}

impl Copy {
    /// The copy of what the child has under this number.
    pub(super) fn of(&self, original: i32) -> OwnedFd {
        let file = self.table.iter().find(|entry| entry.fd == original).unwrap().file;
        self.rebuilt.descriptor(file).unwrap().try_clone_to_owned().unwrap()
    }
}

/// System calls by this process, in which the rebuilt descriptors are.
#[derive(Debug)]
struct Here;

impl Remote for Here {
    fn call(&mut self, _pid: i32, number: i64, arguments: [Argument<'_>; 6]) -> Result<u64, Errno> {
        let arguments = arguments.map(|argument| match argument {
            Argument::Value(value) => value,
            Argument::In(bytes) => bytes.as_ptr() as u64,
            Argument::Out(bytes) => bytes.as_mut_ptr() as u64,
        });
        sys::testing::call(number, arguments)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }
}

/// Rebuilds in this thread's namespaces and finishes as the processes would.
pub(super) fn rebuild(captured: &Captured) -> Copy {
    let mut target = Target::new(0).unwrap();
    for (object, contents) in &captured.contents {
        if let SharedKind::Deleted { path, mode, uid, gid, linkable } = &object.kind {
            let (mode, uid, gid, linkable) = (*mode, *uid, *gid, *linkable);
            let made = Blank { path, mode, uid, gid, linkable }.open().unwrap();
            let mut file = std::fs::File::from(made.try_clone().unwrap());
            std::io::copy(&mut &*contents, &mut file).unwrap();
            target.shared.insert(object.id, made);
        }
    }
    rebuild_in(captured, target)
}

pub(super) fn rebuild_in(captured: &Captured, target: Target) -> Copy {
    // What the wire does to it.
    let bytes = ckpt_format::codec::encode(&captured.files);
    let files: Files = ckpt_format::codec::decode(&bytes).unwrap();
    let mut rebuilt = super::rebuild(&files, &target).unwrap();
    let table = captured.tables[&7].clone();
    // The numbers that the descriptions have here, in place of those in the new process.
    let here = table.iter().map(|entry| Descriptor {
        fd: rebuilt.descriptor(entry.file).unwrap().as_raw_fd(),
        ..*entry
    });
    let tables = BTreeMap::from([(7, here.collect::<Vec<_>>())]);
    rebuilt.finish(&files, &tables, &mut Here).unwrap();
    Copy { rebuilt, table }
}

/// Moves this thread into a network of its own, in which only the loopback interface is up.
pub(super) fn new_network() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    sys::testing::loopback_up().unwrap();
}
