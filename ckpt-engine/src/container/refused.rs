//! System calls that a container has no business with.
//!
//! A container's user namespace already keeps its root from everything that is the host's. The
//! filter takes away what would only be there to be attacked, and what could not go along when
//! the container moves: programs then do without, as on a kernel that lacks it.
//!
//! Pid 1 has the filter before it becomes anything, and so has every process that the host puts
//! inside; all others inherit it. A container that is rebuilt elsewhere gets it there in the same
//! way, so it is never captured. System calls that the engine makes in a process are not
//! filtered (`PTRACE_O_SUSPEND_SECCOMP`).

use std::io;

use libc::sock_filter;

use crate::sys::seccomp;

/// How many filters a process has that installed none itself.
pub(crate) const BASELINE_FILTERS: u64 = 1;

/// A refused call: its name, its numbers for programs of 64 and of 32 bits, and the answer.
struct Refused(
    #[cfg_attr(not(test), expect(dead_code, reason = "a test compares it with the reference"))]
    &'static str,
    Option<libc::c_long>,
    Option<u32>,
    libc::c_int,
);

const REFUSED: &[Refused] = &[
    Refused("acct", Some(libc::SYS_acct), Some(51), libc::EPERM),
    Refused("bpf", Some(libc::SYS_bpf), Some(357), libc::EPERM),
    Refused("clock_settime", Some(libc::SYS_clock_settime), Some(264), libc::EPERM),
    Refused("clock_settime64", None, Some(404), libc::EPERM),
    Refused("delete_module", Some(libc::SYS_delete_module), Some(129), libc::EPERM),
    Refused("finit_module", Some(libc::SYS_finit_module), Some(350), libc::EPERM),
    Refused("init_module", Some(libc::SYS_init_module), Some(128), libc::EPERM),
    Refused("io_uring_enter", Some(libc::SYS_io_uring_enter), Some(426), libc::ENOSYS),
    Refused("io_uring_register", Some(libc::SYS_io_uring_register), Some(427), libc::ENOSYS),
    Refused("io_uring_setup", Some(libc::SYS_io_uring_setup), Some(425), libc::ENOSYS),
    Refused("ioperm", Some(libc::SYS_ioperm), Some(101), libc::EPERM),
    Refused("iopl", Some(libc::SYS_iopl), Some(110), libc::EPERM),
    Refused("kexec_file_load", Some(libc::SYS_kexec_file_load), None, libc::EPERM),
    Refused("kexec_load", Some(libc::SYS_kexec_load), Some(283), libc::EPERM),
    Refused("landlock_add_rule", Some(libc::SYS_landlock_add_rule), Some(445), libc::ENOSYS),
    Refused(
        "landlock_create_ruleset",
        Some(libc::SYS_landlock_create_ruleset),
        Some(444),
        libc::ENOSYS,
    ),
    Refused(
        "landlock_restrict_self",
        Some(libc::SYS_landlock_restrict_self),
        Some(446),
        libc::ENOSYS,
    ),
    Refused("lookup_dcookie", Some(libc::SYS_lookup_dcookie), Some(253), libc::EPERM),
    Refused("memfd_secret", Some(libc::SYS_memfd_secret), Some(447), libc::ENOSYS),
    Refused("open_by_handle_at", Some(libc::SYS_open_by_handle_at), Some(342), libc::EPERM),
    Refused("perf_event_open", Some(libc::SYS_perf_event_open), Some(336), libc::EPERM),
    Refused("settimeofday", Some(libc::SYS_settimeofday), Some(79), libc::EPERM),
    Refused("stime", None, Some(25), libc::EPERM),
    Refused("swapoff", Some(libc::SYS_swapoff), Some(115), libc::EPERM),
    Refused("swapon", Some(libc::SYS_swapon), Some(87), libc::EPERM),
    Refused("syslog", Some(libc::SYS_syslog), Some(103), libc::EPERM),
    Refused("userfaultfd", Some(libc::SYS_userfaultfd), Some(374), libc::EPERM),
];

/// Refuses them for the calling process and all that come from it.
pub(super) fn refuse_calls() -> io::Result<()> {
    seccomp::install(&program())
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// From here on calls of the x32 interface, which no program of a distribution uses.
const X32: u32 = 0x4000_0000;
/// From here on no call at all: what a tracer sets to have a call skipped.
const NONE: u32 = 0x8000_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

/// Goes on with the next instruction if the condition holds, else skips so many.
fn unless(code: u16, value: u32, skip: usize) -> sock_filter {
    sock_filter { code, jt: 0, jf: u8::try_from(skip).expect("the list is short"), k: value }
}

fn answer(action: u32) -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k: action }
}

fn error(errno: libc::c_int) -> sock_filter {
    answer(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs())
}

/// The filter for both kinds of programs.
fn program() -> Vec<sock_filter> {
    let native = |refused: &Refused| refused.1.and_then(|number| u32::try_from(number).ok());
    let mut native_rules = vec![
        load(NUMBER),
        unless(IF_AT_LEAST, NONE, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        unless(IF_AT_LEAST, X32, 1),
        error(libc::ENOSYS),
    ];
    native_rules.extend(rules(native));
    let mut all = vec![load(ARCHITECTURE)];
    all.push(unless(IF_EQUAL, AUDIT_ARCH_X86_64, native_rules.len()));
    all.append(&mut native_rules);
    all.push(unless(IF_EQUAL, AUDIT_ARCH_I386, 1));
    all.push(load(NUMBER));
    // Of no architecture that this host can run: nothing is on the list.
    all.extend(rules(|refused: &Refused| refused.2));
    all
}

/// The answers to what is on the list; everything else is let through.
fn rules(number: impl Fn(&Refused) -> Option<u32>) -> Vec<sock_filter> {
    let numbered = REFUSED.iter().filter_map(|refused| Some((number(refused)?, refused.3)));
    let mut rules: Vec<_> =
        numbered.flat_map(|(number, errno)| [unless(IF_EQUAL, number, 1), error(errno)]).collect();
    rules.push(answer(libc::SECCOMP_RET_ALLOW));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter says to a call, as the kernel would run it.
    fn run(architecture: u32, number: u32) -> u32 {
        let (program, mut at, mut loaded) = (program(), 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let hold = match code {
                LOAD if k == ARCHITECTURE => {
                    loaded = architecture;
                    continue;
                }
                LOAD => {
                    loaded = number;
                    continue;
                }
                RETURN => return k,
                IF_EQUAL => loaded == k,
                _ => loaded >= k,
            };
            at += usize::from(if hold { jt } else { jf });
        }
    }

    #[test]
    fn each_call_on_the_list_gets_its_answer_and_no_other_does() {
        let denied = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
        for (architecture, numbers) in [
            (
                AUDIT_ARCH_X86_64,
                REFUSED.iter().map(|it| (it.1.map(|it| it as u32), it.3)).collect::<Vec<_>>(),
            ),
            (AUDIT_ARCH_I386, REFUSED.iter().map(|it| (it.2, it.3)).collect()),
        ] {
            for number in 0..600 {
                let listed = numbers.iter().find(|(found, _)| *found == Some(number));
                let expected = listed.map_or(libc::SECCOMP_RET_ALLOW, |(_, errno)| denied(*errno));
                assert_eq!(run(architecture, number), expected, "{architecture:x} {number}");
            }
        }
        assert_eq!(run(AUDIT_ARCH_X86_64, X32 + 425), denied(libc::ENOSYS));
        assert_eq!(run(AUDIT_ARCH_X86_64, u32::MAX), libc::SECCOMP_RET_ALLOW);
    }

    #[test]
    fn the_list_is_in_the_reference() {
        let page = include_str!("../../../docs/reference/isolation.md");
        for Refused(name, ..) in REFUSED {
            assert!(page.contains(&format!("`{name}`")), "{name} is not in the reference");
        }
    }
}
