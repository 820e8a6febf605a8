//! A program of 32 bits, as the bytes of its file: assembled with the rest, so that nothing is
//! needed to make it.

use std::arch::global_asm;

global_asm!(include_str!("bits32.s"), options(att_syntax));

unsafe extern "C" {
    #[link_name = "ferry_bits32_start"]
    static START: u8;
    #[link_name = "ferry_bits32_end"]
    static END: u8;
}

/// The whole file. Its comment says what it does.
pub fn image() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    let len = end.addr() - start.addr();
    // SAFETY: both symbols are in one read-only section, and what is between them never changes.
    unsafe { std::slice::from_raw_parts(start, len) }
}

#[cfg(test)]
mod tests {
    use super::image;

    #[test]
    fn it_is_a_file_for_the_i386() {
        assert_eq!(image()[..5], [0x7f, b'E', b'L', b'F', 1]);
        assert_eq!(image()[18], 3);
    }
}
