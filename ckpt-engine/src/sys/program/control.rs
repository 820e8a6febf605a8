//! Switches that a program sets for itself: prctl(2) and its like.

use std::io;

/// A switch that takes and gives plain numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// No transparent huge pages for this process.
    HugePagesDisabled,
    /// All memory of this process may be merged with equal memory.
    MemoryMerge,
    /// No memory that is writable and executable from now on; cannot be taken back.
    DenyWriteExecute,
    /// What happens to this thread when its memory is broken: 0 late, 1 early.
    MachineCheck,
    /// Reading the time stamp counter is an error in this thread: 2.
    TimeStamp,
    /// Keep capabilities and the like through changes of user.
    SecureBits,
    /// Adopt orphans.
    ChildSubreaper,
    /// What ends this thread when its parent ends.
    ParentDeathSignal,
    /// Whether others of the same user may look into this process.
    Dumpable,
    /// No more privileges by execve(2); cannot be taken back.
    NoNewPrivileges,
    /// How late timers of this thread may be, in nanoseconds.
    TimerSlack,
    /// Speculation past stores: 2 enabled, 4 disabled.
    StoreBypass,
}

impl Switch {
    /// Sets it.
    pub fn set(self, value: u64) -> io::Result<()> {
        const POLICY: u64 = 1;
        let zero = 0u64;
        let (option, second, third): (i32, u64, u64) = match self {
            Self::HugePagesDisabled => (libc::PR_SET_THP_DISABLE, value, zero),
            Self::MemoryMerge => (67, value, zero),
            Self::DenyWriteExecute => (65, value, zero),
            Self::MachineCheck => (libc::PR_MCE_KILL, POLICY, value),
            Self::TimeStamp => (libc::PR_SET_TSC, value, zero),
            Self::SecureBits => (libc::PR_SET_SECUREBITS, value, zero),
            Self::ChildSubreaper => (libc::PR_SET_CHILD_SUBREAPER, value, zero),
            Self::ParentDeathSignal => (libc::PR_SET_PDEATHSIG, value, zero),
            Self::Dumpable => (libc::PR_SET_DUMPABLE, value, zero),
            Self::NoNewPrivileges => (libc::PR_SET_NO_NEW_PRIVS, value, zero),
            Self::TimerSlack => (libc::PR_SET_TIMERSLACK, value, zero),
            Self::StoreBypass => (libc::PR_SET_SPECULATION_CTRL, zero, value),
        };
        // SAFETY: none of these options takes a pointer.
        let result = unsafe { libc::prctl(option, second, third, zero, zero) };
        if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads it.
    pub fn get(self) -> io::Result<u64> {
        let zero = 0u64;
        let plain = match self {
            Self::TimeStamp => return pointed(libc::PR_GET_TSC),
            Self::ChildSubreaper => return pointed(libc::PR_GET_CHILD_SUBREAPER),
            Self::ParentDeathSignal => return pointed(libc::PR_GET_PDEATHSIG),
            Self::HugePagesDisabled => libc::PR_GET_THP_DISABLE,
            Self::MemoryMerge => 68,
            Self::DenyWriteExecute => 66,
            Self::MachineCheck => libc::PR_MCE_KILL_GET,
            Self::SecureBits => libc::PR_GET_SECUREBITS,
            Self::Dumpable => libc::PR_GET_DUMPABLE,
            Self::NoNewPrivileges => libc::PR_GET_NO_NEW_PRIVS,
            Self::TimerSlack => libc::PR_GET_TIMERSLACK,
            Self::StoreBypass => libc::PR_GET_SPECULATION_CTRL,
        };
        // SAFETY: none of these options takes a pointer.
        let result = unsafe { libc::prctl(plain, zero, zero, zero, zero) };
        u64::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// The switches that are read into a variable.
fn pointed(option: i32) -> io::Result<u64> {
    let mut value: libc::c_int = 0;
    // SAFETY: these options write one int to the pointer, a live local variable.
    let result = unsafe { libc::prctl(option, &raw mut value, 0u64, 0u64, 0u64) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u64::try_from(value).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// personality(2) with this value; `u32::MAX` only asks. Gives the one before.
pub fn personality(value: u32) -> io::Result<u32> {
    // SAFETY: no pointers.
    let result = unsafe { libc::personality(value.into()) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes a capability from the bounding set of this thread.
pub fn drop_bounding(capability: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(capability), 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts a capability, which must be permitted and inheritable, into the ambient set of this
/// thread.
pub fn raise_ambient(capability: u32) -> io::Result<()> {
    let (raise, capability) = (libc::PR_CAP_AMBIENT_RAISE as u64, u64::from(capability));
    // SAFETY: no pointers.
    let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0u64, 0u64) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets effective, permitted and inheritable capabilities of this thread (capset(2)).
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    const VERSION: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION, 0];
    let half = |set: u64, shift: u32| (set >> shift & 0xffff_ffff) as u32;
    let sets = [effective, permitted, inheritable];
    let data: [[u32; 3]; 2] = [0, 32].map(|shift| sets.map(|set| half(set, shift)));
    // SAFETY: header and data are live structures of the version that the header names.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Changes the user ids of this thread alone: the kernel's call, without the C library's.
pub fn set_thread_user(real: u32, effective: u32, saved: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, real, effective, saved) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// membarrier(2): 1 if all is well.
pub fn membarrier(command: i32) -> io::Result<i64> {
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if result >= 0 { Ok(result) } else { Err(io::Error::last_os_error()) }
}

/// Whether memory can be had that is writable and executable.
pub fn can_write_code() -> bool {
    const LENGTH: usize = 4096;
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: no address is asked for, so no existing map is replaced.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), LENGTH, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the map was made above and is used by nobody.
    unsafe { libc::munmap(start, LENGTH) };
    true
}
