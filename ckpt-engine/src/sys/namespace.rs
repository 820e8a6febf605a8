//! Namespaces, and who a thread is towards the file systems.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::{Gid, Uid, setfsgid, setfsuid},
};

const PR_CAPBSET_DROP: libc::c_int = 24;
const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
const SECBIT_KEEP_CAPS: libc::c_ulong = 1 << 4;

/// All the namespaces that a container has of its own.
pub const CONTAINER_NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWCGROUP
    | CLONE_NEWTIME;

/// A new time namespace, for the children of the caller.
pub const CLONE_NEWTIME: libc::c_int = 0x80;

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves the namespaces in `kinds` (`CLONE_NEW*`) for new ones.
pub fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers; the kernel refuses what a thread may not leave.
    done(unsafe { libc::unshare(kinds) })
}

/// Joins the namespaces in `kinds` of a process.
pub fn join(process: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open.
    done(unsafe { libc::setns(process.as_raw_fd(), kinds) })
}

/// Lets the calling thread keep all its capabilities when it becomes another user.
pub fn keep_capabilities() -> io::Result<()> {
    let bits = SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS;
    // SAFETY: no pointers. Secure bits belong to the calling thread alone.
    done(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) })
}

/// Drops a capability from the bounding set of the calling thread. True while the kernel knows
/// a capability of that number.
pub fn drop_bounding(capability: u32) -> io::Result<bool> {
    // SAFETY: no pointers.
    match unsafe { libc::prctl(PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            source => Err(source),
        },
    }
}

/// Runs `work` as the file system user and group `id`, with all capabilities kept.
///
/// On a thread of its own, which ends with it: nothing else ever runs with these ids. Files made
/// in a file system whose ids are mapped need this, or the kernel cannot express their owner.
pub fn as_user<T: Send>(id: u32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_own_thread(|| {
        become_user(id)?;
        work()
    })
}

/// Makes the calling thread the file system user and group `id` for the rest of its life, with
/// all capabilities kept. For threads that serve one VE and then end.
pub fn become_user(id: u32) -> io::Result<()> {
    // SAFETY: no pointers. Secure bits belong to the calling thread alone.
    done(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) })?;
    setfsgid(Gid::from_raw(id));
    setfsuid(Uid::from_raw(id));
    // The calls report no errors; asking for an impossible id tells the current one.
    let nobody = u32::MAX;
    let now = (setfsgid(Gid::from_raw(nobody)), setfsuid(Uid::from_raw(nobody)));
    match now == (Gid::from_raw(id), Uid::from_raw(id)) {
        true => Ok(()),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Runs `work` in the mount namespace of a process, on a thread of its own.
pub fn in_mounts_of<T: Send>(
    process: impl AsFd + Sync,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let process = process.as_fd();
    on_own_thread(|| {
        // A thread that shares its working directory may not change its mounts.
        unshare(libc::CLONE_FS)?;
        join(process, libc::CLONE_NEWNS)?;
        work()
    })
}

/// Runs `work` on a copy of all that a mount namespace shows, on a thread of its own whose root
/// directory it is: what is mounted or unmounted there is seen by nobody else, and gone with the
/// thread.
pub fn in_copy_of<T: Send>(
    namespace: impl AsFd + Sync,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = namespace.as_fd();
    in_own_mounts(|| {
        let own = std::fs::File::open("/proc/thread-self/ns/mnt")?;
        join(namespace, libc::CLONE_NEWNS)?;
        let copy = super::mount::clone_whole_tree(std::fs::File::open("/")?.as_fd())?;
        super::mount::set_private_recursively(copy.as_fd())?;
        join(own.as_fd(), libc::CLONE_NEWNS)?;
        let place = std::fs::File::open("/proc")?;
        super::mount::attach(copy.as_fd(), place.as_fd(), std::path::Path::new(""))?;
        // No link in the copy may lead out of it.
        nix::unistd::fchdir(&copy)?;
        nix::unistd::chroot(".")?;
        work()
    })
}

/// Runs `work` in a copy of the caller's mount namespace, on a thread of its own: what it attaches
/// is seen by nobody else, and gone with the thread.
pub fn in_own_mounts<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_own_thread(|| {
        unshare(libc::CLONE_NEWNS)?;
        let root = std::fs::File::open("/")?;
        super::mount::set_private_recursively(root.as_fd())?;
        work()
    })
}

/// Runs `work` in a network namespace, on a thread of its own.
pub fn in_network_of<T: Send>(
    network: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        join(network, libc::CLONE_NEWNET)?;
        work()
    })
}

/// Runs `work` in the UTS namespace of a process, on a thread of its own.
pub fn in_names_of<T: Send>(
    process: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        join(process, libc::CLONE_NEWUTS)?;
        work()
    })
}

/// Runs `work` in a cgroup namespace, on a thread of its own.
pub fn in_cgroups_of<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        join(namespace, libc::CLONE_NEWCGROUP)?;
        work()
    })
}

/// Runs `work` in the IPC namespace of a process, on a thread of its own.
pub fn in_ipc_of<T: Send>(
    process: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        join(process, libc::CLONE_NEWIPC)?;
        work()
    })
}

/// Whether a process of ours may make a user namespace: the kernel may have no room for one more, and
/// allows none where `/` is not that of the mount namespace (chroot(2)).
pub fn try_user_namespace() -> io::Result<()> {
    // SAFETY: the child makes system calls only, which is allowed after a fork of a process with
    // several threads.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let errno = unshare(libc::CLONE_NEWUSER).err().and_then(|error| error.raw_os_error());
            // SAFETY: ends the child at once, with nothing of the parent's to be cleaned up.
            unsafe { libc::_exit(errno.unwrap_or(0)) }
        }
        child => match waitpid(nix::unistd::Pid::from_raw(child), None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::ErrorKind::Interrupted.into()),
        },
    }
}

/// A pidfd of a process in the pid namespace of `init` that has ended with this wait status and
/// has been collected.
pub fn ended_process(init: BorrowedFd<'_>, status: i32, thread: bool) -> io::Result<OwnedFd> {
    on_own_thread(|| {
        // For children of this thread alone.
        join(init, libc::CLONE_NEWPID)?;
        // SAFETY: the child makes system calls only, which is allowed after a fork of a process
        // with several threads.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => end_with(status),
            child => {
                let pidfd = super::descriptor::open_process(child, thread);
                // Collected whether or not there is a descriptor for it.
                waitpid(nix::unistd::Pid::from_raw(child), None)?;
                pidfd
            }
        }
    })
}

/// Runs `work` on a thread of its own while a process has this number in the pid namespace of `init`.
pub fn beside_process<T: Send>(
    init: BorrowedFd<'_>,
    number: i32,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        // For children of this thread alone.
        join(init, libc::CLONE_NEWPID)?;
        // SAFETY: an all-zero clone_args is a valid one.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.exit_signal = libc::SIGCHLD.cast_unsigned().into();
        arguments.set_tid = (&raw const number).addr() as u64;
        arguments.set_tid_size = 1;
        let size = size_of::<libc::clone_args>();
        // SAFETY: the structure and the number in it live through the call; the child makes system
        // calls only, which is allowed after a fork of a process with several threads.
        let child = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
        match i32::try_from(child).map_err(io::Error::other)? {
            0 => stop_inside(init),
            child if child > 0 => {
                let child = nix::unistd::Pid::from_raw(child);
                let stopped = waitpid(child, Some(WaitPidFlag::WUNTRACED));
                let done = match stopped? {
                    WaitStatus::Stopped(..) => work(),
                    // It is collected already.
                    _ => return Err(io::ErrorKind::PermissionDenied.into()),
                };
                nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
                waitpid(child, None)?;
                done
            }
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// Becomes one of the users that `init` knows, and stops. For a fresh child only, which is killed.
fn stop_inside(init: BorrowedFd<'_>) -> ! {
    let joined = join(init, libc::CLONE_NEWUSER);
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let own = std::process::id().cast_signed();
    // SAFETY: integers only.
    while joined.is_ok() && unsafe { libc::kill(own, libc::SIGSTOP) } == 0 {}
    // SAFETY: ends the child at once, with nothing of the parent's to be cleaned up.
    unsafe { libc::_exit(1) }
}

/// A process in a pid namespace that does nothing, and ends with this.
#[derive(Debug)]
pub struct StandIn(nix::unistd::Pid);

impl StandIn {
    /// In the pid namespace of `init`.
    pub fn new(init: BorrowedFd<'_>) -> io::Result<Self> {
        on_own_thread(|| {
            // For children of this thread alone.
            join(init, libc::CLONE_NEWPID)?;
            // SAFETY: the child makes system calls only, which is allowed after a fork of a
            // process with several threads.
            match unsafe { libc::fork() } {
                -1 => Err(io::Error::last_os_error()),
                0 => loop {
                    // SAFETY: no pointers.
                    unsafe { libc::pause() };
                },
                child => Ok(Self(nix::unistd::Pid::from_raw(child))),
            }
        })
    }

    /// Its number in our own pid namespace.
    pub fn pid(&self) -> i32 {
        self.0.as_raw()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // It is our child until it is collected here, so both can only succeed.
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Ends the calling process with a wait status. For a fresh child only.
fn end_with(status: i32) -> ! {
    let signal = status & 0x7f;
    if signal != 0 {
        // SAFETY: integers only. No core is written for somebody who has long gone.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
        // SAFETY: the default action runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SAFETY: integers only.
        unsafe { libc::kill(std::process::id().cast_signed(), signal) };
    }
    // SAFETY: ends the child at once, with nothing of the parent's to be cleaned up.
    unsafe { libc::_exit(status >> 8 & 0xff) }
}

pub(super) fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn files_belong_to_the_user_that_the_thread_became() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            directory.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o777),
        )
        .unwrap();
        let path = directory.path().join("file");
        as_user(123_456, || std::fs::write(&path, b"x")).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (123_456, 123_456));
        // The thread that asked is still who it was.
        let own = directory.path().join("own");
        std::fs::write(&own, b"x").unwrap();
        assert_eq!(std::fs::metadata(&own).unwrap().uid(), 0);
    }
}
