//! Filters on system calls.

use std::io;

const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
/// Leave the mitigations of speculative execution as they are: the filter guards the host's
/// interfaces, and keeps no secret from the program.
const SECCOMP_FILTER_FLAG_SPEC_ALLOW: libc::c_ulong = 4;

/// Puts the calling thread, and all that comes from it, behind a filter for good. Needs
/// CAP_SYS_ADMIN in the thread's user namespace; "no new privileges" is not set.
pub fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        // The kernel only reads it, whatever the type says.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `program` and the instructions that it points at live across the call, its length
    // is theirs, and the kernel copies and checks them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    super::check(result).map(drop)
}
