//! What the engine needs of the kernel, tried one by one.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
};

use crate::sys::{
    namespace,
    pagemap::{self, Query},
    socket, task,
    userfault::Tracking,
};

/// Something that the kernel should offer.
#[derive(Debug)]
pub struct Feature {
    /// What it is called.
    pub name: &'static str,
    /// What does not work without it.
    pub purpose: &'static str,
    /// What makes it available.
    pub hint: &'static str,
    /// What came of trying it.
    pub outcome: io::Result<()>,
}

/// Tries everything that no VE can be moved without. Changes nothing.
pub fn features() -> Vec<Feature> {
    let feature = |name, purpose, hint, outcome| Feature { name, purpose, hint, outcome };
    let option = "use a kernel with CONFIG_CHECKPOINT_RESTORE=y, as distributions build it";
    vec![
        feature(
            "userfaultfd with asynchronous write protection",
            "tracking what a VE writes",
            "use Linux 6.8 or newer with CONFIG_USERFAULTFD=y",
            Tracking::own().map(drop),
        ),
        feature(
            "PAGEMAP_SCAN",
            "tracking what a VE writes",
            "use Linux 6.8 or newer with CONFIG_PROC_PAGE_MONITOR=y",
            scan_own_page(),
        ),
        feature("kcmp", "telling shared objects", option, kcmp()),
        feature("TCP_REPAIR", "moving TCP connections", option, repair()),
        feature("/proc/PID/map_files", "reading shared memory", option, map_files()),
        feature("ptrace", "reading registers", "set kernel.yama.ptrace_scope to 2 or less", yama()),
        feature(
            "seccomp filters",
            "keeping a VE from the host",
            "use a kernel with CONFIG_SECCOMP_FILTER=y",
            there("/proc/sys/kernel/seccomp/actions_avail"),
        ),
        feature(
            "user namespaces",
            "running VEs",
            "set user.max_user_namespaces to 10000, and do not run the daemon in a chroot(2)",
            namespace::try_user_namespace(),
        ),
        feature(
            "time namespaces",
            "clocks that never go back",
            "use a kernel with CONFIG_TIME_NS=y",
            there("/proc/self/ns/time"),
        ),
        feature("overlayfs", "files of VEs", "modprobe overlay", filesystem("overlay")),
        feature("TUN devices", "holding packets", "modprobe tun", there("/dev/net/tun")),
    ]
}

/// Whether timers keep their ids without more ado: quicker, but not needed.
pub fn has_timer_ids() -> bool {
    task::can_choose_timer_ids()
}

fn scan_own_page() -> io::Result<()> {
    let page = Box::new(0_u64);
    let start = std::ptr::from_ref(&*page).addr() as u64 & !0xfff;
    let query = Query::default();
    pagemap::scan(&File::open("/proc/self/pagemap")?, start, start + 0x1000, query, |_, _| ())
}

fn kcmp() -> io::Result<()> {
    let own = std::process::id().cast_signed();
    task::share(own, own, task::Common::Memory).map(drop)
}

fn repair() -> io::Result<()> {
    let made = socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let on = 1_i32.to_ne_bytes();
    socket::set_option(made.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, &on)
}

fn map_files() -> io::Result<()> {
    let entry = fs::read_dir("/proc/self/map_files")?.next();
    fs::metadata(entry.ok_or(io::ErrorKind::NotFound)??.path()).map(drop)
}

fn yama() -> io::Result<()> {
    match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) if scope.trim() == "3" => Err(io::ErrorKind::PermissionDenied.into()),
        // Without Yama nothing restricts root.
        _ => Ok(()),
    }
}

fn there(path: &str) -> io::Result<()> {
    fs::metadata(path).map(drop)
}

fn filesystem(name: &str) -> io::Result<()> {
    let known = fs::read_to_string("/proc/filesystems")?;
    match known.lines().any(|line| line.split_whitespace().next_back() == Some(name)) {
        true => Ok(()),
        false => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_offers_what_the_engine_needs() {
        for feature in features() {
            assert!(feature.outcome.is_ok(), "{feature:?}");
        }
    }

    #[test]
    fn in_a_chroot_there_are_no_user_namespaces() {
        let inside = || {
            // Of this thread alone.
            namespace::unshare(libc::CLONE_FS).unwrap();
            std::os::unix::fs::chroot("/run").unwrap();
            namespace::try_user_namespace().unwrap_err().raw_os_error()
        };
        assert_eq!(std::thread::spawn(inside).join().unwrap(), Some(libc::EPERM));
        namespace::try_user_namespace().unwrap();
    }
}
