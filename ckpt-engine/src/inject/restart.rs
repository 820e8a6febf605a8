//! Calls that a stop has interrupted, and that are made again.

use crate::sys::ptrace::Registers;

const EINTR: i64 = -4;
/// As if a signal had interrupted a call that is made again.
pub(crate) const ERESTARTNOHAND: i64 = -514;

/// Calls that the kernel ends with EINTR when the thread is stopped, although no signal came.
const NOT_RESTARTED: [i64; 14] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    libc::SYS_connect,
];

/// The same of the i386 interface, whose numbers are others.
mod i386 {
    /// Calls that are several in one: which, the first argument says.
    pub(super) const SOCKETCALL: i64 = 102;
    pub(super) const IPC: i64 = 117;

    /// epoll_wait, epoll_pwait, epoll_pwait2; rt_sigtimedwait, also with 64 bits of time;
    /// io_getevents, io_pgetevents with both; semtimedop; recvmmsg with both; connect, accept4,
    /// sendto, sendmsg, recvfrom, recvmsg.
    pub(super) const NOT_RESTARTED: [i64; 17] =
        [256, 319, 441, 177, 421, 247, 385, 416, 420, 337, 417, 362, 364, 369, 370, 371, 372];

    /// connect, accept, send, recv, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg.
    pub(super) const OF_SOCKETS: [u32; 10] = [3, 5, 9, 10, 11, 12, 16, 17, 18, 19];

    /// semtimedop.
    pub(super) const OF_IPC: u32 = 4;
}

/// Makes sure that a call which our stop has interrupted is made again instead of telling the
/// program EINTR. A handler that is about to run still gets its EINTR.
pub fn restart_interrupted(registers: &mut Registers) {
    let number = registers.orig_rax as i64;
    if number >= 0 && registers.rax as i64 == EINTR && is_not_restarted(registers) {
        registers.rax = ERESTARTNOHAND as u64;
    }
}

fn is_not_restarted(registers: &Registers) -> bool {
    let number = registers.orig_rax as i64;
    if !is_32_bit_code(registers) {
        return NOT_RESTARTED.contains(&number);
    }
    let which = registers.rbx as u32;
    match number {
        i386::SOCKETCALL => i386::OF_SOCKETS.contains(&which),
        // The upper half is a version.
        i386::IPC => which & 0xffff == i386::OF_IPC,
        _ => i386::NOT_RESTARTED.contains(&number),
    }
}

/// Whether a thread executes code of 32 bits just now: whose calls are those of the i386
/// interface. Programs of 64 bits can do so as well.
pub fn is_32_bit_code(registers: &Registers) -> bool {
    registers.cs != CODE_64
}

/// The kernel's selectors for code of 64 bits, and for its stack.
const CODE_64: u64 = 0x33;
const STACK: u64 = 0x2b;

/// Has a thread execute code of 64 bits: what we put into it is that.
pub(super) fn to_64_bit_code(registers: &mut Registers) {
    (registers.cs, registers.ss) = (CODE_64, STACK);
}

/// What the kernel leaves in the register of a call that goes on by restart_syscall(2).
pub(crate) const ERESTART_RESTARTBLOCK: i64 = -516;

/// What a number that was left is known by.
const LEFT: u64 = 0x0f32_b175;

/// A timed wait that goes on after a stop is a call of restart_syscall(2), and the kernel alone
/// knows of which. A program of 64 bits has the number in the instruction before the call, or else the
/// function by which the kernel goes on tells it; one of
/// 32 bits makes most calls through a common place. So we leave the number where only we find it
/// at the next stop: in registers that code of 32 bits does not have, and the kernel does not
/// touch. With it goes what tells that the wait is still the same.
pub(super) fn leave_number(registers: &mut Registers) {
    if is_32_bit_code(registers)
        && registers.rax as i64 == ERESTART_RESTARTBLOCK
        && registers.orig_rax as i64 > 0
    {
        registers.r15 = LEFT << 32 | (registers.orig_rax & 0xffff_ffff);
        registers.r14 = wait(registers);
    }
}

/// The number that was left in the registers of a thread, if it still waits as it did then.
pub(crate) fn left_number(registers: &Registers) -> Option<u64> {
    let is_left = registers.r15 >> 32 == LEFT && registers.r14 == wait(registers);
    is_left.then_some(registers.r15 & 0xffff_ffff)
}

/// Where a wait keeps what it waits for, and the stack of who waits.
fn wait(registers: &Registers) -> u64 {
    registers.rbx << 32 | (registers.rsp & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ptrace;

    fn registers(number: i64, rax: i64, code: u64) -> Registers {
        let empty = vec![0; size_of::<Registers>()];
        let mut registers = ptrace::registers_from_bytes(&empty).unwrap();
        (registers.orig_rax, registers.rax, registers.cs) = (number as u64, rax as u64, code);
        registers
    }

    fn again(mut registers: Registers) -> bool {
        restart_interrupted(&mut registers);
        registers.rax as i64 == ERESTARTNOHAND
    }

    #[test]
    fn numbers_are_those_of_the_interface() {
        const CODE_32: u64 = 0x23;
        assert!(again(registers(libc::SYS_epoll_wait, EINTR, CODE_64)));
        assert!(!again(registers(libc::SYS_epoll_wait, EINTR, CODE_32)));
        assert!(again(registers(256, EINTR, CODE_32)));
        assert!(!again(registers(256, EINTR, CODE_64)));
        assert!(!again(registers(256, 1, CODE_32)));
    }

    #[test]
    fn a_call_that_is_several_is_told_by_its_argument() {
        let call = |number, which| {
            let registers = registers(number, EINTR, 0x23);
            again(Registers { rbx: which, ..registers })
        };
        assert!(call(102, 12));
        assert!(!call(102, 1));
        assert!(call(117, 0x1_0004));
        assert!(!call(117, 1));
    }

    #[test]
    fn a_number_is_left_for_the_next_stop() {
        let mut waiting = registers(162, ERESTART_RESTARTBLOCK, 0x23);
        (waiting.rbx, waiting.rsp) = (0x1000, 0xff00_0000);
        leave_number(&mut waiting);
        assert_eq!(left_number(&Registers { orig_rax: 0, ..waiting }), Some(162));
        assert_eq!(left_number(&Registers { rsp: 0xff00_1000, ..waiting }), None);
        let mut other = registers(35, ERESTART_RESTARTBLOCK, CODE_64);
        leave_number(&mut other);
        assert_eq!(left_number(&other), None);
    }
}
