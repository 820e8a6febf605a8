//! What the kernel tells about a task by system calls from outside.

use std::{
    cmp::Ordering,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::check;

/// pidfd_open(2). By the number of another thread than the first of a process, of that thread.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    const THREAD: i32 = libc::O_EXCL;
    open_pid(pid, 0).or_else(|error| open_pid(pid, THREAD).map_err(|_| error))
}

fn open_pid(pid: i32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// pidfd_getfd(2): a descriptor of our own for the open file `fd` of that process.
pub fn pidfd_getfd(pidfd: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// get_robust_list(2) of another thread: head and length.
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let mut head = 0u64;
    let mut len = 0u64;
    // SAFETY: both results are live local variables.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    check(result)?;
    Ok((head, len))
}

/// prlimit(2), reading: soft and hard limit of one resource.
pub fn limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: no new limit is passed, and the result is a live local variable.
    let result = unsafe { libc::prlimit64(pid, resource as _, std::ptr::null(), &raw mut limit) };
    check(result.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// prlimit(2), writing.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the limit is a live local variable, and no old limit is asked for.
    let result =
        unsafe { libc::prlimit64(pid, resource as _, &raw const limit, std::ptr::null_mut()) };
    check(result.into()).map(drop)
}

/// Lets this process have as many descriptors as it may: with `CAP_SYS_RESOURCE` as many as any may
/// (`fs.nr_open`), without as many as its hard limit says.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let own = std::process::id().cast_signed();
    let (_, hard) = limit(own, libc::RLIMIT_NOFILE)?;
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(hard, |most: u64| most.max(hard));
    set_limit(own, libc::RLIMIT_NOFILE, most, most)
        .or_else(|_| set_limit(own, libc::RLIMIT_NOFILE, hard, hard))
}

/// `struct sched_attr` up to the deadline fields (sched_getattr(2)).
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names are those of struct sched_attr")]
#[repr(C)]
pub struct SchedulingAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// sched_getattr(2).
pub fn scheduling(tid: i32) -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    let size = size_of::<SchedulingAttributes>();
    // SAFETY: the result is a live structure of the size that is passed with it.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size, 0) })?;
    Ok(attributes)
}

/// sched_setattr(2).
pub fn set_scheduling(tid: i32, attributes: &SchedulingAttributes) -> io::Result<()> {
    let attributes =
        SchedulingAttributes { size: size_of::<SchedulingAttributes>() as u32, ..*attributes };
    // SAFETY: the attributes are a live structure that carries its size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attributes, 0) })
        .map(drop)
}

/// ioprio_get(2) for one thread.
pub fn io_priority(tid: i32) -> io::Result<i32> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) }).map(|value| value as i32)
}

/// ioprio_set(2) for one thread.
pub fn set_io_priority(tid: i32, value: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid, value) }).map(drop)
}

/// Binds the calling thread to one CPU, so that stops of a tracee bound to it as well need no
/// wake-up across CPUs. Returns the affinity to go back to.
pub fn affinity(tid: i32) -> io::Result<[u64; 16]> {
    let mut mask = [0u64; 16];
    // SAFETY: the mask is a live array of the size that is passed with it.
    check(unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&mask), &raw mut mask)
    })?;
    Ok(mask)
}

/// sched_setaffinity(2).
pub fn set_affinity(tid: i32, mask: &[u64; 16]) -> io::Result<()> {
    // SAFETY: the mask is a live array of the size that is passed with it.
    check(unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid, size_of_val(mask), mask.as_ptr())
    })
    .map(drop)
}

/// What tasks can have in common (kcmp(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Common {
    /// The address space.
    Memory = 1,
    /// The descriptor table.
    Descriptors = 2,
    /// Root, working directory and umask.
    Directories = 3,
}

/// The order of two tasks by what they may have in common: equal if they have.
pub fn compare(one: i32, other: i32, by: Common) -> io::Result<Ordering> {
    // SAFETY: no pointers.
    let order = check(unsafe { libc::syscall(libc::SYS_kcmp, one, other, by as i32, 0, 0) })?;
    match order {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether two tasks have it in common.
pub fn share(one: i32, other: i32, what: Common) -> io::Result<bool> {
    compare(one, other, what).map(|order| order == Ordering::Equal)
}

/// memfd_create(2), close-on-exec and sealable.
pub fn memfd(name: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a live C string.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The same, of huge pages of this size in bytes.
pub fn memfd_of_huge_pages(name: &str, page: u64) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    let size = page.trailing_zeros() << libc::MFD_HUGE_SHIFT;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | size;
    // SAFETY: the name is a live C string.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `prctl(2)` request: timer_create(2) takes the id from the caller (Linux 6.16).
pub const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
const PR_TIMER_CREATE_RESTORE_IDS_GET: u64 = 2;

/// True where a process may choose the ids of its timers.
pub fn can_choose_timer_ids() -> bool {
    static ANSWER: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ANSWER.get_or_init(|| {
        let (request, get) = (PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET);
        // SAFETY: no pointers; unknown requests are refused.
        unsafe { libc::syscall(libc::SYS_prctl, request, get, 0, 0, 0) >= 0 }
    })
}

/// The number of the calling thread.
pub fn own_number() -> i32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// What a thread can take away from itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// Reading the time stamp counter (`PR_SET_TSC`).
    TimeStamp,
    /// The cpuid instruction (`ARCH_SET_CPUID`).
    Cpuid,
    /// To keep its data in the level 1 cache when it leaves the processor (`PR_SPEC_L1D_FLUSH`).
    Cache,
}

impl Switch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::TimeStamp, Self::Cpuid, Self::Cache];

    /// Does some work without it in the calling thread. The work must not use what is switched
    /// off: neither clocks nor a look at what the processor can do.
    pub fn off<T>(self, work: impl FnOnce() -> T) -> io::Result<T> {
        self.set(true)?;
        let done = work();
        self.set(false)?;
        Ok(done)
    }

    fn set(self, off: bool) -> io::Result<()> {
        const ARCH_SET_CPUID: libc::c_long = 0x1012;
        const PR_SET_SPECULATION_CTRL: libc::c_long = 53;
        const L1D_FLUSH: libc::c_long = 2;
        const ENABLE: libc::c_long = 1 << 1;
        const DISABLE: libc::c_long = 1 << 2;
        let choose = |yes: libc::c_long, no| if off { yes } else { no };
        let (number, arguments) = match self {
            Self::TimeStamp => {
                let how = choose(libc::PR_TSC_SIGSEGV.into(), libc::PR_TSC_ENABLE.into());
                (libc::SYS_prctl, [libc::PR_SET_TSC.into(), how, 0])
            }
            Self::Cpuid => (libc::SYS_arch_prctl, [ARCH_SET_CPUID, choose(0, 1), 0]),
            Self::Cache => {
                (libc::SYS_prctl, [PR_SET_SPECULATION_CTRL, L1D_FLUSH, choose(ENABLE, DISABLE)])
            }
        };
        let [first, second, third] = arguments;
        // SAFETY: the calls take integers and touch no memory of ours.
        check(unsafe { libc::syscall(number, first, second, third, 0, 0) }).map(drop)
    }
}
