//! System calls made by a stopped thread of another process.
//!
//! Two ways. [`Stopped::call`] makes one call through the `syscall` instruction of the vdso and
//! changes nothing in the process's memory. A [`Gate`], a small private mapping in the process,
//! holds a loop that makes a whole table of calls in one stop; see [`Batch`].

mod done;
mod error;
mod late;
mod restart;
mod vdso;

use std::{
    cell::Cell,
    io,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use ckpt_format::controls::Dispatch;

use self::restart::{leave_number, to_64_bit_code};
pub use self::{
    done::Done,
    error::InjectError,
    late::let_go_late_stops,
    restart::{is_32_bit_code, restart_interrupted},
    vdso::{Vdso, vdso_image},
};
pub(crate) use self::{
    restart::{ERESTART_RESTARTBLOCK, ERESTARTNOHAND, left_number},
    vdso::read_image,
};
use crate::{
    procfs,
    sys::{
        ptrace::{self, Registers, Stop},
        vm,
    },
};

/// All signals blocked. So we use no trap that the kernel forces on a thread (a breakpoint, a single
/// step): its SIGTRAP would take the mask and, where it is ignored, its disposition away.
const ALL: u64 = !0;

/// A thread in a ptrace stop, with the state that it must get back.
#[derive(Debug)]
pub struct Stopped {
    /// The thread, as numbered on the host.
    pub tid: i32,
    /// The registers before we changed anything.
    pub registers: Registers,
    /// The signal mask before we changed anything.
    pub mask: u64,
    /// The signal that had stopped the process before we came (job control).
    pub stopped_by: Option<i32>,
    /// Where its system calls went to its own handler before we changed that: ours must not.
    pub dispatch: Option<Dispatch>,
    /// A signal to stop arrived while we had the thread; it is due when we let it go.
    late_stop: Cell<bool>,
}

impl Stopped {
    /// Stops all of these threads; those that have ended meanwhile are left out.
    ///
    /// All are interrupted first and waited for afterwards, so that they stop side by side.
    pub fn attach(tids: &[i32], options: i32) -> Result<Vec<Self>, InjectError> {
        let_go_late_stops();
        let mut seized = Vec::with_capacity(tids.len());
        // Until it stops a thread runs on, with the filters that it has given itself.
        let running = options & !ptrace::SUSPEND_SECCOMP;
        for &tid in tids {
            match ptrace::seize(tid, running).and_then(|()| ptrace::interrupt(tid)) {
                Ok(()) => seized.push(tid),
                Err(source) if source.raw_os_error() == Some(libc::ESRCH) => {}
                Err(source) => {
                    release(&seized);
                    return Err(match late::contains(tid) {
                        true => InjectError::Busy { tid },
                        false => InjectError::Attach { tid, source },
                    });
                }
            }
        }
        let mut stopped = Vec::with_capacity(seized.len());
        for (index, &tid) in seized.iter().enumerate() {
            let waited = Self::wait_for_stop(tid).and_then(|thread| {
                match ptrace::set_options(tid, options) {
                    Ok(()) => Ok(thread),
                    Err(source) => {
                        drop(thread.detach());
                        Err(InjectError::control(tid)(source))
                    }
                }
            });
            match waited {
                Ok(thread) => stopped.push(thread),
                Err(InjectError::Ended { .. }) => {}
                Err(error) => {
                    release(&seized[index..]);
                    for thread in stopped {
                        drop(thread.detach());
                    }
                    return Err(error);
                }
            }
        }
        Ok(stopped)
    }

    /// Takes over a thread that was attached at its birth and is about to stop for us.
    pub fn at_birth(tid: i32) -> Result<Self, InjectError> {
        Self::wait_for_stop(tid)
    }

    fn wait_for_stop(tid: i32) -> Result<Self, InjectError> {
        let control = || InjectError::control(tid);
        let late_stop = Cell::new(false);
        let stopped_by = loop {
            match wait_bounded(tid)? {
                Stop::Ended(_) => return Err(InjectError::Ended { tid }),
                Stop::Stopped { signal, event } => {
                    if (Stop::Stopped { signal, event }).is_event_stop() {
                        break (signal != libc::SIGTRAP).then_some(signal);
                    }
                    // A signal arrived first. Put it back; the interrupt is still to come. Not one
                    // to stop: its sender would be told, look, and see us.
                    let is_stop = signal == libc::SIGSTOP && event == 0;
                    late_stop.set(late_stop.get() || is_stop);
                    let signal = if is_stop { 0 } else { signal };
                    ptrace::resume(tid, signal).map_err(control())?;
                }
            }
        };
        let registers = ptrace::registers(tid).map_err(control())?;
        let mask = ptrace::signal_mask(tid).map_err(control())?;
        ptrace::set_signal_mask(tid, ALL).map_err(control())?;
        let dispatch = ptrace::dispatch(tid).map_err(control())?;
        if dispatch.is_some() {
            ptrace::set_dispatch(tid, None).map_err(control())?;
        }
        Ok(Self { tid, registers, mask, stopped_by, dispatch, late_stop })
    }

    /// Makes one system call through the vdso of this process.
    pub fn call(&self, vdso: Vdso, number: i64, arguments: &[u64]) -> Result<u64, InjectError> {
        self.begin_call(vdso, number, arguments)?;
        self.end_call()
    }

    fn begin_call(&self, vdso: Vdso, number: i64, arguments: &[u64]) -> Result<(), InjectError> {
        let tid = self.tid;
        let mut registers = self.registers;
        to_64_bit_code(&mut registers);
        vdso.call(tid, &mut registers, number, arguments)?;
        // No interrupted call: the kernel must not restart anything with our registers.
        registers.orig_rax = u64::MAX;
        ptrace::set_registers(tid, &registers).map_err(InjectError::control(tid))?;
        ptrace::resume_to_call(tid).map_err(InjectError::control(tid))
    }

    fn end_call(&self) -> Result<u64, InjectError> {
        let tid = self.tid;
        let mut has_begun = false;
        loop {
            match ptrace::wait(tid).map_err(InjectError::control(tid))? {
                Stop::Ended(_) => return Err(InjectError::Ended { tid }),
                stop if stop.is_at_call() && has_begun => break,
                stop if stop.is_at_call() => has_begun = true,
                stop if self.goes_on_after(stop) => {}
                Stop::Stopped { signal, event } => {
                    return Err(InjectError::Unexpected { tid, signal, event });
                }
            }
            ptrace::resume_to_call(tid).map_err(InjectError::control(tid))?;
        }
        Ok(ptrace::registers(tid).map_err(InjectError::control(tid))?.rax)
    }

    /// True for stops on the way that are none of ours. SIGSTOP, which no mask holds back, is
    /// kept until the thread is let go: until then the process must do what we ask of it.
    fn goes_on_after(&self, stop: Stop) -> bool {
        let is_late = matches!(stop, Stop::Stopped { signal: libc::SIGSTOP, event: 0 });
        if is_late {
            self.late_stop.set(true);
        }
        is_late || stop.is_event_stop()
    }

    /// The signal that stops the process once we let it go, if one does.
    pub fn stop_signal(&self) -> Option<i32> {
        self.stopped_by.or_else(|| self.late_stop.get().then_some(libc::SIGSTOP))
    }

    /// As [`Self::call`], with an error number turned into an error.
    pub fn checked_call(
        &self,
        vdso: Vdso,
        name: &'static str,
        number: i64,
        arguments: &[u64],
    ) -> Result<u64, InjectError> {
        self.checked(name, self.call(vdso, number, arguments)?)
    }

    fn checked(&self, name: &'static str, value: u64) -> Result<u64, InjectError> {
        check_return(value as i64).map_err(|source| InjectError::Call {
            call: name.into(),
            tid: self.tid,
            source,
        })
    }

    /// Puts registers and mask back, so that the thread goes on where it was once it is resumed.
    pub fn put_back(&self) -> Result<(), InjectError> {
        let mut registers = self.registers;
        restart_interrupted(&mut registers);
        leave_number(&mut registers);
        ptrace::set_registers(self.tid, &registers).map_err(InjectError::control(self.tid))?;
        if self.dispatch.is_some() {
            ptrace::set_dispatch(self.tid, self.dispatch)
                .map_err(InjectError::control(self.tid))?;
        }
        ptrace::set_signal_mask(self.tid, self.mask).map_err(InjectError::control(self.tid))
    }

    /// [`Self::put_back`] and let go.
    pub fn detach(self) -> Result<(), InjectError> {
        self.put_back()?;
        if self.late_stop.get() {
            let pid = nix::unistd::Pid::from_raw(self.tid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)
                .map_err(|error| InjectError::control(self.tid)(error.into()))?;
        }
        ptrace::detach(self.tid, 0).map_err(InjectError::control(self.tid))
    }
}

/// How long a thread may take to come to a stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// Waits for a stop, but not for ever: a thread whose vfork(2) child still runs, or that waits
/// for a dead disk, does not stop.
fn wait_bounded(tid: i32) -> Result<Stop, InjectError> {
    let start = Instant::now();
    let mut tries = 0;
    loop {
        if let Some(stop) = ptrace::try_wait(tid).map_err(InjectError::control(tid))? {
            return Ok(stop);
        }
        tries += 1;
        if tries < 100 {
            std::thread::yield_now();
        } else if start.elapsed() < STOP_TIMEOUT {
            std::thread::sleep(Duration::from_micros(100));
        } else {
            late::add(tid);
            return Err(InjectError::Busy { tid });
        }
    }
}

fn release(tids: &[i32]) {
    for &tid in tids {
        // A thread detaches only from a stop, and one that has ended needs nothing.
        if matches!(wait_bounded(tid), Ok(Stop::Stopped { .. })) {
            drop(ptrace::detach(tid, 0));
        }
    }
}

/// A system call's return value as the kernel leaves it in the register.
pub fn check_return(value: i64) -> io::Result<u64> {
    match value {
        -4095..=-1 => Err(io::Error::from_raw_os_error(-value as i32)),
        value => Ok(value as u64),
    }
}

/// `test rbp,rbp; jz end; load number and arguments from the table at rbx; syscall; store the
/// result; next entry; end:`, and [`END`].
const LOOP: [u8; 49] = [
    0x48, 0x85, 0xed, // 0: test rbp, rbp
    0x74, 0x2c, // 3: jz 49
    0x48, 0x8b, 0x03, // 5: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // 8: mov rdi, [rbx+8]
    0x48, 0x8b, 0x73, 0x10, // 12: mov rsi, [rbx+16]
    0x48, 0x8b, 0x53, 0x18, // 16: mov rdx, [rbx+24]
    0x4c, 0x8b, 0x53, 0x20, // 20: mov r10, [rbx+32]
    0x4c, 0x8b, 0x43, 0x28, // 24: mov r8, [rbx+40]
    0x4c, 0x8b, 0x4b, 0x30, // 28: mov r9, [rbx+48]
    0x0f, 0x05, // 32: syscall
    0x48, 0x89, 0x43, 0x38, // 34: mov [rbx+56], rax
    0x48, 0x83, 0xc3, 0x40, // 38: add rbx, 64
    0x48, 0xff, 0xcd, // 42: dec rbp
    0x75, 0xd6, // 45: jnz 5
    0x90, 0x90, // 47: nop; nop
];

/// The same for calls of the i386 interface, with the table at r12 and the count in r13.
const LOOP_32: [u8; 55] = [
    0x4d, 0x85, 0xed, // 0: test r13, r13
    0x74, 0x32, // 3: jz 55
    0x41, 0x8b, 0x04, 0x24, // 5: mov eax, [r12]
    0x41, 0x8b, 0x5c, 0x24, 0x08, // 9: mov ebx, [r12+8]
    0x41, 0x8b, 0x4c, 0x24, 0x10, // 14: mov ecx, [r12+16]
    0x41, 0x8b, 0x54, 0x24, 0x18, // 19: mov edx, [r12+24]
    0x41, 0x8b, 0x74, 0x24, 0x20, // 24: mov esi, [r12+32]
    0x41, 0x8b, 0x7c, 0x24, 0x28, // 29: mov edi, [r12+40]
    0x41, 0x8b, 0x6c, 0x24, 0x30, // 34: mov ebp, [r12+48]
    0xcd, 0x80, // 39: int 0x80
    0x49, 0x89, 0x44, 0x24, 0x38, // 41: mov [r12+56], rax
    0x49, 0x83, 0xc4, 0x40, // 46: add r12, 64
    0x49, 0xff, 0xcd, // 50: dec r13
    0x75, 0xce, // 53: jnz 5
];

/// `tkill(gettid(), r15)`, which we see as a stop, and nobody else: a traced thread is asked about
/// signals that it ignores as well.
const END: [u8; 20] = [
    0xb8, 0xba, 0x00, 0x00, 0x00, // 0: mov eax, 186
    0x0f, 0x05, // 5: syscall
    0x89, 0xc7, // 7: mov edi, eax
    0x44, 0x89, 0xfe, // 9: mov esi, r15d
    0xb8, 0xc8, 0x00, 0x00, 0x00, // 12: mov eax, 200
    0x0f, 0x05, // 17: syscall
    0xcc, // 19: int3, which is not reached
];

/// The signals of [`END`], of which the first is not used by anybody: in this order when the
/// thread has had one before.
const END_SIGNALS: [i32; 3] = [libc::SIGSTKFLT, libc::SIGPWR, libc::SIGXFSZ];

/// Where the second loop stands in a gate.
const PLACE_32: u64 = 128;
const TABLE: u64 = 4096;
const ENTRY: usize = 64;
const CALLS_MAX: usize = 2048;
const DATA: u64 = TABLE + (CALLS_MAX * ENTRY) as u64;

/// The mapping in a process that holds the loop, its table of calls and their data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Where it is in the process.
    pub base: u64,
}

impl Gate {
    /// Its size in bytes.
    pub const SIZE: u64 = 512 << 10;

    /// Where in it a thread sends itself the signal whose number is in r15.
    pub(crate) const END: u64 = LOOP.len() as u64;

    /// Maps a gate into the process of a stopped thread: at `base`, or where the kernel likes.
    pub fn open(thread: &Stopped, vdso: Vdso, base: Option<u64>) -> Result<Self, InjectError> {
        let (code, data) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        if base.is_some() {
            flags |= libc::MAP_FIXED_NOREPLACE;
        }
        let map = |address: u64, len: u64, protection: i32, flags: i32| {
            let arguments = [address, len, protection as u64, flags as u64, u64::MAX, 0];
            thread.checked_call(vdso, "mmap", libc::SYS_mmap, &arguments)
        };
        let wanted = base.unwrap_or(0);
        let base = match map(wanted, Self::SIZE, code | data, flags) {
            // It has given up memory that is both (`PR_SET_MDWE`): one call more.
            Err(InjectError::Call { source, .. })
                if source.raw_os_error() == Some(libc::EACCES) =>
            {
                let base = map(wanted, Self::SIZE, code, flags)?;
                map(base + TABLE, Self::SIZE - TABLE, data, flags | libc::MAP_FIXED)?;
                base
            }
            other => other?,
        };
        let gate = Self { base };
        gate.write(thread.tid, base, &[&LOOP[..], &END].concat())?;
        gate.write(thread.tid, base + PLACE_32, &[&LOOP_32[..], &END].concat())?;
        Ok(gate)
    }

    /// Removes the gate through the vdso: the last call of all.
    pub fn close(self, thread: &Stopped, vdso: Vdso) -> Result<(), InjectError> {
        self.begin_close(thread, vdso)?;
        self.end_close(thread)
    }

    /// The same in two steps, so that many threads do it at once.
    pub fn begin_close(self, thread: &Stopped, vdso: Vdso) -> Result<(), InjectError> {
        thread.begin_call(vdso, libc::SYS_munmap, &[self.base, Self::SIZE])
    }

    /// The other step.
    pub fn end_close(self, thread: &Stopped) -> Result<(), InjectError> {
        thread.checked("munmap", thread.end_call()?).map(drop)
    }

    /// An empty table of calls for this gate.
    pub fn batch(self) -> Batch {
        self.batch_of(Interface::Native)
    }

    /// The same for calls of the i386 interface, with its numbers: a gate at an address of 32 bits
    /// can make them in any process.
    pub fn batch_32(self) -> Batch {
        self.batch_of(Interface::I386)
    }

    fn batch_of(self, interface: Interface) -> Batch {
        let (table, names, data) = (Vec::new(), Vec::new(), Vec::new());
        Batch { gate: self, interface, table, names, steps: Vec::new(), data }
    }

    /// As the process itself, which costs least; its code in the gate may be read-only.
    fn write(self, tid: i32, address: u64, bytes: &[u8]) -> Result<(), InjectError> {
        if vm::write_process(tid, bytes, &[(address, bytes.len())]).ok() == Some(bytes.len()) {
            return Ok(());
        }
        memory(tid)
            .and_then(|file| file.write_all_at(bytes, address))
            .map_err(InjectError::control(tid))
    }
}

/// `/proc/TID/mem`, which writes through the protection of private mappings.
pub fn memory(tid: i32) -> io::Result<std::fs::File> {
    std::fs::OpenOptions::new().read(true).write(true).open(procfs::path(tid, "mem"))
}

/// By which numbers and registers the kernel is called.
#[derive(Clone, Copy, Debug)]
enum Interface {
    Native,
    I386,
}

/// A table of system calls to be made by one thread in one stop.
#[derive(Debug)]
pub struct Batch {
    gate: Gate,
    interface: Interface,
    table: Vec<u8>,
    names: Vec<&'static str>,
    /// What calls are made for, from each of these on.
    steps: Vec<(usize, &'static str)>,
    data: Vec<u8>,
}

impl Batch {
    /// Says what the calls that follow are made for; see [`Done::all_steps`].
    pub fn step(&mut self, what: &'static str) {
        self.steps.push((self.names.len(), what));
    }

    /// Adds a call and returns its index.
    pub fn call(&mut self, name: &'static str, number: i64, arguments: &[u64]) -> usize {
        self.names.push(name);
        self.table.extend_from_slice(&(number as u64).to_le_bytes());
        for index in 0..6 {
            let argument = arguments.get(index).copied().unwrap_or(0);
            self.table.extend_from_slice(&argument.to_le_bytes());
        }
        self.table.extend_from_slice(&[0; 8]);
        self.names.len() - 1
    }

    /// Adds bytes for calls to use; returns their address in the process.
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let address = self.gate.base + DATA + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        address
    }

    /// Adds a text with its terminating zero.
    pub fn text(&mut self, text: &str) -> u64 {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Adds room for a result of `len` bytes.
    pub fn room(&mut self, len: usize) -> u64 {
        self.bytes(&vec![0; len])
    }

    /// True without any call.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// True when the next few calls, with up to 16 KiB of data, may not fit any more.
    pub fn is_nearly_full(&self) -> bool {
        self.names.len() + 16 > CALLS_MAX || DATA + self.data.len() as u64 + (16 << 10) > Gate::SIZE
    }

    /// Makes the calls in that thread, all of them whatever each returns.
    pub fn run(self, thread: &Stopped) -> Result<Done, InjectError> {
        let tid = thread.tid;
        let base = self.gate.base;
        let count = self.names.len();
        let (table, data) = (self.table.len(), self.data.len());
        let places = [(base + TABLE, table), (base + DATA, data)];
        let all = [self.table, self.data].concat();
        if vm::write_process(tid, &all, &places).map_err(InjectError::control(tid))? != all.len() {
            return Err(InjectError::control(tid)(io::ErrorKind::WriteZero.into()));
        }
        let mut registers = thread.registers;
        to_64_bit_code(&mut registers);
        let len = match self.interface {
            Interface::Native => {
                (registers.rip, registers.rbx) = (base, base + TABLE);
                registers.rbp = count as u64;
                LOOP.len()
            }
            Interface::I386 => {
                (registers.rip, registers.r12) = (base + PLACE_32, base + TABLE);
                registers.r13 = count as u64;
                LOOP_32.len()
            }
        };
        registers.orig_rax = u64::MAX;
        let end = registers.rip + (len + END.len() - 1) as u64;
        let births = run_until(end, registers, thread)?;
        let mut memory = all;
        match vm::read_process(tid, &mut memory, &places).map_err(InjectError::control(tid))? {
            count if count == memory.len() => {}
            _ => return Err(InjectError::control(tid)(io::ErrorKind::UnexpectedEof.into())),
        }
        let data = memory.split_off(table);
        let (names, steps, data_start) = (self.names, self.steps, base + DATA);
        Ok(Done { tid, names, steps, table: memory, births, data, data_start })
    }
}

/// Lets the thread run with these registers until it has sent itself a signal right before `end`;
/// collects the threads and processes born.
fn run_until(end: u64, begin: Registers, thread: &Stopped) -> Result<Vec<i32>, InjectError> {
    let tid = thread.tid;
    let control = || InjectError::control(tid);
    let mut births = Vec::new();
    let [mut expected, ..] = END_SIGNALS;
    let ready = |registers: Registers, signal: i32| {
        ptrace::set_registers(tid, &Registers { r15: signal as u64, ..registers })?;
        ptrace::set_signal_mask(tid, ALL & !(1 << (signal - 1)))
    };
    ready(begin, expected).map_err(control())?;
    let mut resumed_with = 0;
    loop {
        ptrace::resume(tid, resumed_with).map_err(control())?;
        resumed_with = 0;
        match ptrace::wait(tid).map_err(control())? {
            Stop::Ended(_) => return Err(InjectError::Ended { tid }),
            Stop::Stopped { signal, event: 0 } if signal == expected => {
                let registers = ptrace::registers(tid).map_err(control())?;
                if registers.rip == end {
                    ptrace::set_signal_mask(tid, ALL).map_err(control())?;
                    return Ok(births);
                }
                // It had this one before, which goes back into its queue when it is blocked.
                let next = END_SIGNALS.into_iter().skip_while(|end| *end != signal).nth(1);
                expected = next.ok_or(InjectError::Unexpected { tid, signal, event: 0 })?;
                ready(registers, expected).map_err(control())?;
                resumed_with = signal;
            }
            Stop::Stopped {
                event: libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ..
            } => {
                let born = ptrace::event_message(tid).map_err(control())?;
                births.push(born as i32);
            }
            stop if thread.goes_on_after(stop) => {}
            Stop::Stopped { signal, event } => {
                return Err(InjectError::Unexpected { tid, signal, event });
            }
        }
    }
}

#[cfg(test)]
mod tests;
