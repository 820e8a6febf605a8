//! Calls with a timeout that were interrupted and are to be made again on the target.
//!
//! The kernel goes on with such a call by restart_syscall(2), with the time that is left. That
//! means nothing elsewhere: the call itself is made again, which is exact for absolute times and
//! repeats the whole interval for relative ones. So its number must be known. Interrupted once, the
//! registers tell it. After that only the program does, and only if it stands in the instruction before the
//! call; else the kernel's own function for it (`restart_block` in include/linux/restart_block.h)
//! tells which call it is.

use std::{fs, sync::OnceLock};

use super::thread::code;
use crate::{
    bits32::INTERRUPT,
    btf::Types,
    eye::Eye,
    inject::{ERESTART_RESTARTBLOCK, ERESTARTNOHAND, is_32_bit_code, left_number},
    sys::ptrace::Registers,
};

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// restart_syscall(2) for programs of 32 bits.
const RESTART_32: i64 = 0;

/// The kernel's functions that go on with a call (kernel/futex/waitwake.c, fs/select.c,
/// kernel/time/).
const FUNCTIONS: [&str; 5] = [
    "futex_wait_restart",
    "do_restart_poll",
    "hrtimer_nanosleep_restart",
    "alarm_timer_nsleep_restart",
    "posix_cpu_nsleep_restart",
];

/// Finds out what takes long, before there is a hurry.
pub(crate) fn prepare() {
    addresses();
}

/// Where the functions are; 0 for one that this kernel lacks, or does not show.
fn addresses() -> &'static [u64; FUNCTIONS.len()] {
    static ADDRESSES: OnceLock<[u64; FUNCTIONS.len()]> = OnceLock::new();
    ADDRESSES.get_or_init(|| {
        let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
        find(&symbols)
    })
}

fn find(symbols: &str) -> [u64; FUNCTIONS.len()] {
    let mut found = [0; FUNCTIONS.len()];
    for line in symbols.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(_), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if let Some(place) = FUNCTIONS.iter().position(|function| *function == name) {
            found[place] = u64::from_str_radix(address, 16).unwrap_or(0);
        }
    }
    found
}

/// The function by which the kernel goes on with the last interrupted call of a thread.
pub(super) fn function_of(tid: i32) -> Option<u64> {
    static PLACE: OnceLock<Option<u32>> = OnceLock::new();
    let place = PLACE.get_or_init(|| {
        let types = Types::read().ok()?;
        let block = types.offset("task_struct", "restart_block").ok()?;
        Some(block + types.offset("restart_block", "fn").ok()?)
    });
    let eye = Eye::on(tid).ok()?;
    eye.number(eye.task().ok()?, (*place)?).ok()
}

/// Makes a call that was interrupted before be made again, from its beginning.
///
/// It may also have been on its way to make restart_syscall(2), and not have got there: a thread
/// without CPU time can stay at that point for long.
pub(super) fn again(host: i32, registers: &mut Registers, function: impl FnOnce() -> Option<u64>) {
    let interrupted = registers.orig_rax.cast_signed();
    if interrupted < 0 {
        return;
    }
    let is_32_bit = is_32_bit_code(registers);
    let (restart, instruction) = match is_32_bit {
        true => (RESTART_32, INTERRUPT),
        false => (libc::SYS_restart_syscall, SYSCALL),
    };
    let restarts =
        registers.rax.cast_signed() == restart && code(host, registers.rip) == Some(instruction);
    let number_at = match registers.rax.cast_signed() {
        ERESTART_RESTARTBLOCK => registers.rip,
        _ if restarts => registers.rip + instruction.len() as u64,
        _ => return,
    };
    let number = match (interrupted == restart, is_32_bit) {
        (false, _) => Some(registers.orig_rax),
        (true, false) => number_in_program(host, number_at)
            .or_else(|| number_by_function(addresses(), function()?, registers)),
        (true, true) => left_number(registers).or_else(|| number_of_32(host, registers, number_at)),
    };
    match number {
        Some(number) if restarts => registers.rax = number,
        Some(number) => {
            registers.rax = ERESTARTNOHAND.cast_unsigned();
            registers.orig_rax = number;
        }
        None => tracing::warn!(host, "a timed wait that will end with EINTR"),
    }
}

/// The number that `mov eax, number; syscall` right before `rip` calls.
fn number_in_program(host: i32, rip: u64) -> Option<u64> {
    match code(host, rip.checked_sub(7)?)? {
        [0xb8, a, b, c, d, 0x0f, 0x05] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => None,
    }
}

/// The same of a program of 32 bits: before `int 0x80`, or before `call gs:[0x10]`, which leads to
/// the vdso. That keeps three registers on the stack, above which is where it returns to.
fn number_of_32(host: i32, registers: &Registers, rip: u64) -> Option<u64> {
    /// nanosleep, clock_nanosleep and futex, those also with 64 bits of time; poll.
    const TIMED: [u32; 6] = [162, 267, 407, 240, 422, 168];
    let number = match code(host, rip.checked_sub(7)?) {
        Some([0xb8, a, b, c, d, 0xcd, 0x80]) => u32::from_le_bytes([a, b, c, d]),
        _ => {
            let back = u32::from_le_bytes(code(host, registers.rsp + 12)?);
            number_before_call(code(host, u64::from(back).checked_sub(12)?)?)?
        }
    };
    TIMED.contains(&number).then_some(u64::from(number))
}

fn number_before_call(code: [u8; 12]) -> Option<u32> {
    match code {
        // A program without libraries has a place of its own for the address.
        [0xb8, a, b, c, d, 0x65, 0xff, 0x15, 0x10, 0, 0, 0]
        | [_, 0xb8, a, b, c, d, 0xff, 0x15, _, _, _, _] => Some(u32::from_le_bytes([a, b, c, d])),
        _ => None,
    }
}

/// The number of the call that the kernel goes on with by this function. The registers still hold
/// its arguments.
fn number_by_function(
    functions: &[u64; FUNCTIONS.len()],
    function: u64,
    registers: &Registers,
) -> Option<u64> {
    let place = functions.iter().position(|address| *address == function && *address != 0)?;
    let number = match FUNCTIONS[place] {
        "futex_wait_restart" => libc::SYS_futex,
        "do_restart_poll" => libc::SYS_poll,
        // The first argument of one is an address, that of the other the number of a clock.
        "hrtimer_nanosleep_restart" if registers.rdi >= CLOCKS_MAX => libc::SYS_nanosleep,
        _ => libc::SYS_clock_nanosleep,
    };
    Some(number.cast_unsigned())
}

/// More than the number of any clock, less than any address that may be mapped.
const CLOCKS_MAX: u64 = 64;

#[cfg(test)]
mod tests {
    use nix::{
        sys::{
            signal::{Signal, kill},
            wait::waitpid,
        },
        unistd::Pid,
    };

    use super::*;
    use crate::{
        inject::Stopped,
        procfs,
        sys::{ptrace, testing::fork_waiter},
    };

    /// `mov eax, 7; syscall`, as a program would poll(2).
    static POLL: [u8; 7] = [0xb8, 7, 0, 0, 0, 0x0f, 0x05];

    fn empty() -> Registers {
        ptrace::registers_from_bytes(&vec![0; size_of::<Registers>()]).unwrap()
    }

    fn restarted(orig_rax: i64, rax: i64, at: usize) -> (i64, i64) {
        let own = std::process::id().cast_signed();
        let mut registers = empty();
        registers.orig_rax = orig_rax.cast_unsigned();
        registers.rax = rax.cast_unsigned();
        registers.rip = POLL.as_ptr() as u64 + at as u64;
        registers.cs = 0x33;
        again(own, &mut registers, || None);
        (registers.orig_rax.cast_signed(), registers.rax.cast_signed())
    }

    #[test]
    fn an_interrupted_wait_is_made_again() {
        let again = (7, ERESTARTNOHAND);
        assert_eq!(restarted(7, ERESTART_RESTARTBLOCK, 7), again);
        // For the second time: its number is only in the program.
        assert_eq!(restarted(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK, 7), again);
    }

    #[test]
    fn a_wait_about_to_be_restarted_is_made_again() {
        // The kernel has put the instruction and its number back already.
        let restart = libc::SYS_restart_syscall;
        assert_eq!(restarted(7, restart, 5), (7, 7));
        assert_eq!(restarted(restart, restart, 5), (restart, 7));
    }

    #[test]
    fn the_number_of_a_wait_of_32_bits_is_found() {
        /// `mov eax, number; int 0x80`.
        static SLEEP: [u8; 7] = [0xb8, 162, 0, 0, 0, 0xcd, 0x80];
        static WRITE: [u8; 7] = [0xb8, 4, 0, 0, 0, 0xcd, 0x80];
        let own = std::process::id().cast_signed();
        let registers = empty();
        let number = |code: &[u8; 7]| number_of_32(own, &registers, code.as_ptr() as u64 + 7);
        assert_eq!(number(&SLEEP), Some(162));
        assert_eq!(number(&WRITE), None);
        let call = [0xb8, 168, 0, 0, 0, 0x65, 0xff, 0x15, 0x10, 0, 0, 0];
        assert_eq!(number_before_call(call), Some(168));
        let call = [0x90, 0xb8, 168, 0, 0, 0, 0xff, 0x15, 0x10, 0x20, 0x30, 0x40];
        assert_eq!(number_before_call(call), Some(168));
        assert_eq!(number_before_call([0x90; 12]), None);
    }

    #[test]
    fn other_threads_stay_as_they_are() {
        assert_eq!(restarted(-1, ERESTART_RESTARTBLOCK, 7), (-1, ERESTART_RESTARTBLOCK));
        let value = libc::SYS_restart_syscall;
        assert_eq!(restarted(7, value, 7), (7, value));
        assert_eq!(restarted(7, 1, 5), (7, 1));
    }

    #[test]
    fn the_function_of_the_kernel_tells_the_call() {
        let functions = [1, 2, 3, 4, 5];
        let mut registers = empty();
        let mut told = |function, rdi| {
            registers.rdi = rdi;
            number_by_function(&functions, function, &registers).map(u64::cast_signed)
        };
        assert_eq!(told(1, 0x1000), Some(libc::SYS_futex));
        assert_eq!(told(2, 0x1000), Some(libc::SYS_poll));
        assert_eq!(told(3, 0x1000), Some(libc::SYS_nanosleep));
        assert_eq!(told(3, 1), Some(libc::SYS_clock_nanosleep));
        assert_eq!(told(4, 8), Some(libc::SYS_clock_nanosleep));
        assert_eq!(told(6, 1), None);
        // A kernel that hides its addresses shows zeros.
        assert_eq!(number_by_function(&[0; 5], 0, &empty()), None);
    }

    #[test]
    fn symbols_are_found() {
        let symbols = "ffffffff81000000 T _text\nffffffff81441dc0 t futex_wait_restart\n\
                       ffffffffc0000000 t do_restart_poll\t[module]\n";
        assert_eq!(find(symbols), [0xffff_ffff_8144_1dc0, 0xffff_ffff_c000_0000, 0, 0, 0]);
    }

    #[test]
    fn a_wait_is_known_however_often_it_was_interrupted() {
        // The number of its call does not stand beside it in the program.
        let host = fork_waiter().unwrap();
        let stop = || {
            while procfs::Stat::read(host).unwrap().state != 'S' {
                std::thread::yield_now();
            }
            Stopped::attach(&[host], 0).unwrap().pop().unwrap()
        };
        stop().detach().unwrap();
        stop().detach().unwrap();
        let thread = stop();
        let mut registers = thread.registers;
        assert_eq!(registers.orig_rax.cast_signed(), libc::SYS_restart_syscall);
        again(host, &mut registers, || function_of(host));
        assert_eq!(registers.orig_rax.cast_signed(), libc::SYS_futex);
        assert_eq!(registers.rax.cast_signed(), ERESTARTNOHAND);
        thread.detach().unwrap();
        let pid = Pid::from_raw(host);
        kill(pid, Signal::SIGKILL).unwrap();
        waitpid(pid, None).unwrap();
    }
}
