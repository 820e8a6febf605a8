//! Network namespaces, held by descriptor.
//!
//! A [`Netns`] keeps its namespace alive. Work inside it is done on a thread of its own, because
//! the namespace of a thread is state that must not leak into the rest of the program: whatever
//! the work does, the calling thread stays where it was.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::sched::{CloneFlags, setns, unshare};

/// One network namespace.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        // Not /proc/self: that is the first thread of the process, which may be elsewhere.
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace of the process with this number.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace behind a file: one of `/proc/PID/ns/net` or a place where it is mounted.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { fd: File::open(path)?.into() })
    }

    /// Takes a descriptor of a namespace, e.g. one received from another process.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// A new namespace with nothing in it but a loopback interface that is down.
    pub fn create() -> io::Result<Self> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })?
    }

    /// Runs `work` on a thread that is inside the namespace, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_own_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok::<T, io::Error>(work())
        })?
    }

    /// Another handle of the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `work` on a thread that ends with it. A panic in `work` goes on in the caller.
fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of_current() -> String {
        std::fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string()
    }

    #[test]
    fn work_runs_inside_and_the_caller_stays_outside() {
        let before = name_of_current();
        let netns = Netns::create().expect("needs root");
        let inside = netns.run(name_of_current).unwrap();
        assert_ne!(inside, before);
        assert_eq!(netns.run(name_of_current).unwrap(), inside, "it is the same one every time");
        assert_eq!(name_of_current(), before);
    }
}
