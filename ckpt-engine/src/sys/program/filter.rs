//! seccomp(2) filters of a program's own.

use std::io;

use libc::sock_filter;

/// Whom a filter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The calling thread.
    Thread,
    /// All threads of the process, which must have the same filters so far.
    Process,
    /// The calling thread; what is refused is logged.
    Logged,
}

/// What a refused call gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An error number.
    Error(u16),
    /// SIGSYS.
    Trap,
}

/// Refuses one system call from now on, in a program of at least `length` instructions.
pub fn refuse(call: i64, answer: Answer, scope: Scope, length: usize) -> io::Result<()> {
    const NUMBER: u32 = 0;
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let answer_with = (libc::BPF_RET | libc::BPF_K) as u16;
    let call = u32::try_from(call).map_err(|_| io::ErrorKind::InvalidInput)?;
    let refused = match answer {
        Answer::Error(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
        Answer::Trap => libc::SECCOMP_RET_TRAP,
    };
    let instruction = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    // The number is loaded again and again where a long program is asked for.
    let mut program = vec![instruction(load, 0, 0, NUMBER); length.max(4) - 3];
    program.push(instruction(equal, 0, 1, call));
    program.push(instruction(answer_with, 0, 0, refused));
    program.push(instruction(answer_with, 0, 0, libc::SECCOMP_RET_ALLOW));
    let flags = match scope {
        Scope::Thread => 0,
        Scope::Process => libc::SECCOMP_FILTER_FLAG_TSYNC,
        Scope::Logged => libc::SECCOMP_FILTER_FLAG_LOG,
    };
    install(&program, flags)
}

fn install(program: &[sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut(),
    };
    let (call, mode) = (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER);
    // SAFETY: the program lives across the call, its length is right, and the kernel only reads.
    let result = unsafe { libc::syscall(call, mode, flags, &raw const program) };
    match result {
        0 => Ok(()),
        // The thread that has other filters.
        1.. => Err(io::ErrorKind::ResourceBusy.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes a system call without arguments by its number: its result as the kernel gives it.
pub fn plain_call(call: PlainCall) -> Result<i64, i32> {
    // SAFETY: the calls of this type take no arguments and change nothing.
    let result = unsafe { libc::syscall(call.number()) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

/// System calls that anybody can make and that do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the calls")]
pub enum PlainCall {
    Getuid,
    Geteuid,
    Getgid,
    Getegid,
    Getpgrp,
    Getppid,
}

impl PlainCall {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Getuid, Self::Geteuid, Self::Getgid, Self::Getegid, Self::Getpgrp, Self::Getppid];

    /// The number of the call.
    pub fn number(self) -> i64 {
        match self {
            Self::Getuid => libc::SYS_getuid,
            Self::Geteuid => libc::SYS_geteuid,
            Self::Getgid => libc::SYS_getgid,
            Self::Getegid => libc::SYS_getegid,
            Self::Getpgrp => libc::SYS_getpgrp,
            Self::Getppid => libc::SYS_getppid,
        }
    }
}
