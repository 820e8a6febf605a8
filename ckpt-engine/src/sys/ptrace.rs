//! ptrace(2): stopping foreign threads, their registers and signals.
//!
//! A ptrace relation belongs to the *thread* that made it: all calls for one tracee must come
//! from the thread that seized it.

use std::io;

use ckpt_format::{controls::Dispatch, process::Segment};

use super::check;

/// The general registers, `struct user_regs_struct`.
pub type Registers = libc::user_regs_struct;

/// The set of registers that holds the extended (FPU, SSE, AVX …) state.
const NT_X86_XSTATE: usize = 0x202;
/// In bytes: more than any processor has.
const EXTENDED_STATE_MAX: usize = 16384;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_GET_THREAD_AREA: u32 = 25;
const PTRACE_SET_THREAD_AREA: u32 = 26;

/// The numbers that the kernel has for segments of a thread (`GDT_ENTRY_TLS_MIN` and on).
const SEGMENTS: std::ops::RangeInclusive<usize> = 12..=14;
/// The bit of `struct user_desc` for a segment that is none.
const NOT_PRESENT: u32 = 1 << 5;

/// Kill the tracee when the tracer dies: for processes that must not outlive us.
pub const EXIT_KILL: i32 = libc::PTRACE_O_EXITKILL;
/// Attach to children and threads of the tracee as they are born.
pub const TRACE_BIRTHS: i32 =
    libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK;
/// Lift the tracee's seccomp filters while it is traced.
pub const SUSPEND_SECCOMP: i32 = 1 << 21;

/// `struct ptrace_rseq_configuration`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RseqConfiguration {
    /// The address of the thread's `struct rseq`; 0 when not registered.
    pub pointer: u64,
    /// Its size.
    pub size: u32,
    /// The signature in front of abort handlers.
    pub signature: u32,
    flags: u32,
    pad: u32,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The thread is in a ptrace stop; `event` is `PTRACE_EVENT_*` or 0.
    Stopped {
        /// The signal of the stop.
        signal: i32,
        /// The event, 0 for a plain signal stop.
        event: i32,
    },
    /// The thread has ended with this wait status.
    Ended(i32),
}

impl Stop {
    /// A stop made by `PTRACE_INTERRUPT`, by a birth, or a group stop.
    pub fn is_event_stop(self) -> bool {
        matches!(self, Self::Stopped { event: PTRACE_EVENT_STOP, .. })
    }

    /// A stop at the begin or the end of a system call.
    pub fn is_at_call(self) -> bool {
        const AT_CALL: i32 = libc::SIGTRAP | 0x80;
        matches!(self, Self::Stopped { signal: AT_CALL, event: 0 })
    }
}

fn request(request: u32, tid: i32, address: usize, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: every caller passes, in `address` and `data`, what ptrace(2) wants for `request`:
    // plain numbers, or pointers to live local variables of the documented type and size.
    check(unsafe { libc::ptrace(request, tid, address, data) })
}

/// Attaches without stopping. Stops at calls can always be told from those of signals.
pub fn seize(tid: i32, options: i32) -> io::Result<()> {
    let options = options | libc::PTRACE_O_TRACESYSGOOD;
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes the options given to [`seize`].
pub fn set_options(tid: i32, options: i32) -> io::Result<()> {
    let options = options | libc::PTRACE_O_TRACESYSGOOD;
    request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// Asks a seized thread to stop.
pub fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go on, with `signal` delivered when it is not 0.
pub fn resume(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped thread go on until the next system call begins or ends.
pub fn resume_to_call(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Ends the relation; the thread goes on, with `signal` delivered when it is not 0.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The message of the last event: the new thread's number after a birth.
pub fn event_message(tid: i32) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// Reads the general registers.
pub fn registers(tid: i32) -> io::Result<Registers> {
    // SAFETY: `user_regs_struct` is a plain structure of integers, for which zero is valid.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut registers as usize)?;
    Ok(registers)
}

/// Writes the general registers.
pub fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, &raw const *registers as usize).map(drop)
}

/// The general registers as bytes, the form in which they travel.
pub fn registers_to_bytes(registers: &Registers) -> Vec<u8> {
    let start = (&raw const *registers).cast::<u8>();
    // SAFETY: the structure holds only integers without padding, and outlives the slice.
    unsafe { std::slice::from_raw_parts(start, size_of::<Registers>()) }.to_vec()
}

/// The inverse of [`registers_to_bytes`]; `None` when the size is another one.
pub fn registers_from_bytes(bytes: &[u8]) -> Option<Registers> {
    if bytes.len() != size_of::<Registers>() {
        return None;
    }
    // SAFETY: the size was checked, and any bytes are a valid structure of integers.
    Some(unsafe { bytes.as_ptr().cast::<Registers>().read_unaligned() })
}

/// Reads the extended state (x87, SSE, AVX, AVX-512 …) in the XSAVE layout.
pub fn extended_state(tid: i32) -> io::Result<Vec<u8>> {
    let mut state = vec![0u8; EXTENDED_STATE_MAX];
    let mut iov = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    state.truncate(iov.iov_len);
    Ok(state)
}

/// Writes the extended state. Zeros may be missing at its end.
pub fn set_extended_state(tid: i32, state: &[u8]) -> io::Result<()> {
    // The kernel wants all of it, and takes no notice of more.
    let mut whole = [0u8; EXTENDED_STATE_MAX];
    whole.get_mut(..state.len()).ok_or(io::ErrorKind::InvalidData)?.copy_from_slice(state);
    let mut iov = libc::iovec { iov_base: whole.as_mut_ptr().cast(), iov_len: whole.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// The thread's blocked signals; inside sigsuspend(2) and its like the mask to return to.
pub fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the thread's blocked signals.
pub fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// The thread's rseq(2) registration.
pub fn rseq(tid: i32) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfiguration>(),
        &raw mut configuration as usize,
    )?;
    Ok(configuration)
}

/// A seccomp filter of the thread, the oldest for place 0: its program, as `struct sock_filter`s,
/// and whether it was installed with `SECCOMP_FILTER_FLAG_LOG`.
pub fn seccomp_filter(tid: i32, place: usize) -> io::Result<(Vec<u8>, bool)> {
    const INSTRUCTION: usize = 8;
    const FLAG_LOG: u64 = 2;
    let count = request(PTRACE_SECCOMP_GET_FILTER, tid, place, 0)? as usize;
    let mut program = vec![0u8; count * INSTRUCTION];
    request(PTRACE_SECCOMP_GET_FILTER, tid, place, program.as_mut_ptr() as usize)?;
    // `struct seccomp_metadata`: the place goes in, the flags come out.
    let mut metadata = [place as u64, 0];
    let size = size_of_val(&metadata);
    request(PTRACE_SECCOMP_GET_METADATA, tid, size, metadata.as_mut_ptr() as usize)?;
    Ok((program, metadata[1] & FLAG_LOG != 0))
}

/// Where the thread's system calls go to its own handler (`PR_SET_SYSCALL_USER_DISPATCH`); `None`
/// when they do not.
pub fn dispatch(tid: i32) -> io::Result<Option<Dispatch>> {
    let mut words = [0u64; 4];
    let size = size_of_val(&words);
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, words.as_mut_ptr() as usize)?;
    let [mode, selector, offset, len] = words;
    Ok((mode != 0).then_some(Dispatch { mode, selector, offset, len }))
}

/// The inverse of [`dispatch`].
pub fn set_dispatch(tid: i32, dispatch: Option<Dispatch>) -> io::Result<()> {
    let Dispatch { mode, selector, offset, len } = dispatch.unwrap_or_default();
    let words = [mode, selector, offset, len];
    let (size, address) = (size_of_val(&words), words.as_ptr() as usize);
    request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, address).map(drop)
}

/// The segments of a thread that are its own (set_thread_area(2)).
pub fn segments(tid: i32) -> io::Result<Vec<Segment>> {
    let mut found = Vec::new();
    for entry in SEGMENTS {
        // `struct user_desc`: number, base, limit, flags.
        let mut words = [0u32; 4];
        request(PTRACE_GET_THREAD_AREA, tid, entry, words.as_mut_ptr() as usize)?;
        let [entry, base, limit, flags] = words;
        if flags & NOT_PRESENT == 0 {
            found.push(Segment { entry, base, limit, flags });
        }
    }
    Ok(found)
}

/// Gives a thread a segment of its own; one that is no such is refused by the kernel.
pub fn set_segment(tid: i32, segment: Segment) -> io::Result<()> {
    let Segment { entry, base, limit, flags } = segment;
    let words = [entry, base, limit, flags];
    let address = words.as_ptr() as usize;
    request(PTRACE_SET_THREAD_AREA, tid, entry as usize, address).map(drop)
}

/// The signals pending for a thread, or (`shared`) for its whole process; 128 bytes each.
pub fn pending_signals(tid: i32, shared: bool) -> io::Result<Vec<[u8; 128]>> {
    let mut all = Vec::new();
    loop {
        let mut batch = [[0u8; 128]; 16];
        let mut arguments = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: u32::from(shared),
            nr: batch.len() as i32,
        };
        let count = request(
            libc::PTRACE_PEEKSIGINFO,
            tid,
            &raw mut arguments as usize,
            &raw mut batch as usize,
        )? as usize;
        all.extend_from_slice(&batch[..count]);
        if count < batch.len() {
            return Ok(all);
        }
    }
}

/// Waits for the next stop or the end of one traced thread.
pub fn wait(tid: i32) -> io::Result<Stop> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live local variable for the result.
        match check(unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) }.into()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) if libc::WIFSTOPPED(status) => {
                return Ok(Stop::Stopped {
                    signal: libc::WSTOPSIG(status),
                    event: (status >> 16) & 0xffff,
                });
            }
            Ok(_) => return Ok(Stop::Ended(status)),
        }
    }
}

/// As [`wait`], but returns `None` at once when nothing has happened.
pub fn try_wait(tid: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    // SAFETY: `status` is a live local variable for the result.
    let result = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    match check(result.into())? {
        0 => Ok(None),
        _ if libc::WIFSTOPPED(status) => Ok(Some(Stop::Stopped {
            signal: libc::WSTOPSIG(status),
            event: (status >> 16) & 0xffff,
        })),
        _ => Ok(Some(Stop::Ended(status))),
    }
}
