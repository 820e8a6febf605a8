//! The kernel's code in a process, through which the process makes calls for us.

use std::{io, sync::OnceLock};

use serde::{Deserialize, Serialize};

use super::InjectError;
use crate::{
    bits32, procfs,
    sys::{ptrace::Registers, vm},
};

/// Where it is in a process, and of which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vdso {
    /// Its first address.
    pub start: u64,
    /// Whether it is that of programs of 32 bits.
    pub is_32_bit: bool,
}

impl Vdso {
    /// Puts a call into the registers of a thread, which executes code of 64 bits: also there the
    /// kernel takes `int 0x80` for a call of the i386 interface, as which it does what the call
    /// must do in a process of 32 bits: find room where that can reach it.
    pub(super) fn call(
        self,
        tid: i32,
        registers: &mut Registers,
        number: i64,
        arguments: &[u64],
    ) -> Result<(), InjectError> {
        let argument = |place: usize| arguments.get(place).copied().unwrap_or(0);
        let [first, second, third, fourth, fifth, sixth] = [0, 1, 2, 3, 4, 5].map(argument);
        if self.is_32_bit {
            registers.rip = self.start + bits32::call_offset().ok_or(InjectError::NoVdso)?;
            registers.rax = i386_number(number).ok_or(InjectError::NoVdso)?;
            (registers.rbx, registers.rcx, registers.rdx) = (first, second, third);
            (registers.rsi, registers.rdi, registers.rbp) = (fourth, fifth, sixth);
        } else {
            registers.rip = self.start + syscall_offset().ok_or(InjectError::NoVdso)?;
            registers.rax = number as u64;
            (registers.rdi, registers.rsi, registers.rdx) = (first, second, third);
            (registers.r10, registers.r8, registers.r9) = (fourth, fifth, sixth);
        }
        self.check(tid, registers.rip)
    }

    /// A process with a vdso that is so low may be executing another kind of program meanwhile.
    fn check(self, tid: i32, address: u64) -> Result<(), InjectError> {
        let expected = if self.is_32_bit { bits32::INTERRUPT } else { SYSCALL };
        if self.start >> 32 != 0 {
            return Ok(());
        }
        let mut found = [0; 2];
        match vm::read_process(tid, &mut found, &[(address, 2)]) {
            Ok(2) if found == expected => Ok(()),
            _ => Err(InjectError::NoVdso),
        }
    }
}

/// The numbers of what is called through a vdso. The arguments are the same: nothing but memory
/// without a file is mapped in this way, so that the unit of an offset does not matter.
fn i386_number(number: i64) -> Option<u64> {
    match number {
        libc::SYS_mmap => Some(192),
        libc::SYS_munmap => Some(91),
        libc::SYS_close => Some(6),
        libc::SYS_getpid => Some(20),
        libc::SYS_userfaultfd => Some(374),
        _ => None,
    }
}

/// The instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Where in the vdso a `syscall` instruction stands: the same in every process.
fn syscall_offset() -> Option<u64> {
    static OFFSET: OnceLock<Option<u64>> = OnceLock::new();
    *OFFSET.get_or_init(|| {
        vdso_image()?.windows(2).position(|pair| pair == SYSCALL).map(|at| at as u64)
    })
}

/// The code of this kernel's vdso, which both ends of a move must share.
pub fn vdso_image() -> Option<Vec<u8>> {
    read_image(std::process::id().cast_signed()).ok().map(|(image, _)| image)
}

/// The vdso of a process, and how long it is with its data.
pub(crate) fn read_image(pid: i32) -> io::Result<(Vec<u8>, u64)> {
    let maps = procfs::read_text(pid, "maps").map_err(io::Error::other)?;
    let (mut image, mut all) = (Vec::new(), 0);
    for map in procfs::parse_maps(&maps) {
        match map.name.as_str() {
            "[vdso]" => {
                image = vec![0; (map.end - map.start) as usize];
                let len = image.len();
                vm::read_process(pid, &mut image, &[(map.start, len)])?;
            }
            "[vvar]" | "[vvar_vclock]" => {}
            _ => continue,
        }
        all += map.end - map.start;
    }
    match image.is_empty() {
        true => Err(io::ErrorKind::NotFound.into()),
        false => Ok((image, all)),
    }
}
