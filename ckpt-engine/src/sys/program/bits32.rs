//! Code of 32 bits, assembled with the rest, so that nothing is needed to make it: a program, as
//! the bytes of its file, and a piece for a program of 64 bits.

use std::arch::global_asm;
use std::io;
use std::ptr;

use super::map::PAGE_BYTES;

global_asm!(include_str!("bits32.s"), options(att_syntax));

unsafe extern "C" {
    #[link_name = "ferry_bits32_start"]
    static START: u8;
    #[link_name = "ferry_bits32_end"]
    static END: u8;
    #[link_name = "ferry_within_start"]
    static WITHIN_START: u8;
    #[link_name = "ferry_within_end"]
    static WITHIN_END: u8;
}

/// The whole file. Its comment says what it does.
pub fn image() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    let len = end.addr() - start.addr();
    // SAFETY: both symbols are in one read-only section, and what is between them never changes.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Code of 32 bits in this process, which is one of 64. There can be one in a process; it stays.
#[derive(Debug)]
pub struct Within(extern "C" fn(u32, u32) -> u32);

impl Within {
    /// Puts it where code of both kinds reaches it.
    pub fn new() -> io::Result<Self> {
        const PLACE: usize = 0x2000_0000;
        let (start, end) = (&raw const WITHIN_START, &raw const WITHIN_END);
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let place = ptr::without_provenance_mut(PLACE);
        // SAFETY: what is mapped there already is not replaced.
        let memory = unsafe { libc::mmap(place, 2 * PAGE_BYTES, protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both symbols are in one section, and what is between them is less than a page,
        // as is the room for it.
        unsafe { ptr::copy_nonoverlapping(start, memory.cast(), end.addr() - start.addr()) };
        // SAFETY: the code is that of a function of these arguments, and keeps the registers that
        // a function must keep.
        let call = unsafe {
            std::mem::transmute::<*mut libc::c_void, extern "C" fn(u32, u32) -> u32>(memory)
        };
        Ok(Self(call))
    }

    /// Counts down from `turns` there, and adds three for each turn. Nobody else may call it
    /// meanwhile, which `&mut` sees to.
    pub fn count(&mut self, turns: u32, from: u32) -> u32 {
        (self.0)(turns.max(1), from)
    }
}

#[cfg(test)]
mod tests {
    use super::{Within, image};

    #[test]
    fn code_of_32_bits_counts() {
        let mut within = Within::new().unwrap();
        assert_eq!(within.count(1000, 5), 3005);
        assert_eq!(within.count(7, u32::MAX), 20);
    }

    #[test]
    fn it_is_a_file_for_the_i386() {
        assert_eq!(image()[..5], [0x7f, b'E', b'L', b'F', 1]);
        assert_eq!(image()[18], 3);
    }
}
