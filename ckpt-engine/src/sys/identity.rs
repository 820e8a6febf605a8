//! As whom the calling thread acts. Only the thread changes, never the process: these are the
//! raw system calls, not the C library's, which change all threads.

use std::io;

use super::check;

/// Makes files and socket nodes that this thread creates belong to this user and group, and
/// keeps all capabilities.
pub fn own_new_files(uid: u32, gid: u32) -> io::Result<()> {
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 4;
    // SAFETY: the call takes integers and touches no memory of ours.
    let bits = check(libc::c_long::from(unsafe { libc::prctl(libc::PR_GET_SECUREBITS) }))?;
    let bits = bits.cast_unsigned() | SECBIT_NO_SETUID_FIXUP;
    // SAFETY: as above.
    check(libc::c_long::from(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) }))?;
    // These two return the old id and never fail visibly.
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    Ok(())
}

/// Gives the calling process a session keyring of its own, without keys, where the kernel has keys.
pub fn new_session_keyring() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: without a name the call takes no pointer.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        joined => joined.map(drop),
    }
}

fn set_effective(uid: u32, gid: u32) -> io::Result<()> {
    let same = u32::MAX;
    // SAFETY: the call takes integers and touches no memory of ours.
    check(unsafe { libc::syscall(libc::SYS_setresgid, same, gid, same) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, same, uid, same) }).map(drop)
}

/// Runs `work` with this effective user and group, which is what sockets remember of their
/// maker. To be used after [`own_new_files`], which keeps the capabilities over it.
pub fn act_as<T>(uid: u32, gid: u32, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: the call takes no argument.
    let own_uid = unsafe { libc::geteuid() };
    // SAFETY: the call takes no argument.
    let own_gid = unsafe { libc::getegid() };
    if (uid, gid) == (own_uid, own_gid) {
        return work();
    }
    // SAFETY: an id that nobody has changes nothing and returns the present one.
    let files_gid = unsafe { libc::syscall(libc::SYS_setfsgid, u32::MAX) };
    // SAFETY: as above.
    let files_uid = unsafe { libc::syscall(libc::SYS_setfsuid, u32::MAX) };
    set_effective(uid, gid)?;
    let result = work();
    set_effective(own_uid, own_gid)?;
    // SAFETY: the call takes one integer.
    unsafe { libc::syscall(libc::SYS_setfsgid, files_gid) };
    // SAFETY: the call takes one integer.
    unsafe { libc::syscall(libc::SYS_setfsuid, files_uid) };
    result
}
