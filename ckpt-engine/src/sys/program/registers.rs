//! Values kept in registers for a while, the vector and floating point ones included.

use std::arch::{asm, is_x86_feature_detected};

/// Words that go through the registers: sixteen vectors of four words.
const WORDS: usize = 64;

/// Keeps a pattern in sixteen vector registers, three general ones and the floating point control
/// words for so many turns of a loop that uses nothing else, and says whether all of it was still
/// there. The processor may do anything else in between, such as being another one.
pub fn hold(seed: u64, turns: u64) -> bool {
    let mut pattern = [0u64; WORDS];
    let mut state = seed;
    for word in &mut pattern {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = state;
    }
    let mut found = [0u64; WORDS];
    let (general, controls) = if is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX, as checked.
        unsafe { hold_ymm(&pattern, &mut found, turns) }
    } else {
        return hold_general(seed, turns);
    };
    found == pattern && general && controls
}

/// A round-to-zero mode that Rust itself never uses, and back to the default afterwards.
const MXCSR_HELD: u32 = 0x7f80;
const X87_HELD: u16 = 0x0f7f;

macro_rules! all_ymm {
    ($before:literal, $after:literal) => {
        concat!(
            $before, "0", $after, "0]\n", $before, "1", $after, "32]\n", $before, "2", $after,
            "64]\n", $before, "3", $after, "96]\n", $before, "4", $after, "128]\n", $before, "5",
            $after, "160]\n", $before, "6", $after, "192]\n", $before, "7", $after, "224]\n",
            $before, "8", $after, "256]\n", $before, "9", $after, "288]\n", $before, "10", $after,
            "320]\n", $before, "11", $after, "352]\n", $before, "12", $after, "384]\n", $before,
            "13", $after, "416]\n", $before, "14", $after, "448]\n", $before, "15", $after,
            "480]\n",
        )
    };
}

macro_rules! store_ymm {
    ($($number:literal $offset:literal),*) => {
        concat!($("vmovdqu [{out} + ", $offset, "], ymm", $number, "\n"),*)
    };
}

/// Whether the general registers and the control words kept their values; the vectors are in
/// `found`.
#[target_feature(enable = "avx")]
fn hold_ymm(pattern: &[u64; WORDS], found: &mut [u64; WORDS], turns: u64) -> (bool, bool) {
    let held = [MXCSR_HELD, u32::from(X87_HELD)];
    let mut seen = [0u32; 2];
    let mut saved = [0u32; 2];
    let (r10, r11, r12): (u64, u64, u64);
    // SAFETY: the block reads `pattern` and `held`, writes `found`, `seen` and `saved`, all of
    // them of the sizes used; it names every register that it changes and puts the control words
    // back.
    unsafe {
        asm!(
            "stmxcsr [{saved}]",
            "fnstcw [{saved} + 4]",
            "ldmxcsr [{held}]",
            "fldcw [{held} + 4]",
            all_ymm!("vmovdqu ymm", ", [{pattern} + "),
            "2: dec {turns}",
            "jnz 2b",
            store_ymm!("0" "0", "1" "32", "2" "64", "3" "96", "4" "128", "5" "160", "6" "192",
                "7" "224", "8" "256", "9" "288", "10" "320", "11" "352", "12" "384",
                "13" "416", "14" "448", "15" "480"),
            "stmxcsr [{seen}]",
            "fnstcw [{seen} + 4]",
            "fldcw [{saved} + 4]",
            "ldmxcsr [{saved}]",
            pattern = in(reg) pattern.as_ptr(),
            out = in(reg) found.as_mut_ptr(),
            held = in(reg) held.as_ptr(),
            seen = in(reg) seen.as_mut_ptr(),
            saved = in(reg) saved.as_mut_ptr(),
            turns = inout(reg) turns.max(1) => _,
            inout("r10") pattern[0] => r10,
            inout("r11") pattern[1] => r11,
            inout("r12") pattern[2] => r12,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
    let general = [r10, r11, r12] == pattern[..3];
    // The low half of the second word is the x87 control word; exception flags may be set.
    let controls = (seen[0] & !0x3f, seen[1] & 0xffff) == (MXCSR_HELD, u32::from(X87_HELD));
    (general, controls)
}

fn hold_general(seed: u64, turns: u64) -> bool {
    let kept: u64;
    // SAFETY: the loop touches no memory and names every register that it changes.
    unsafe {
        asm!("2: dec {turns}", "jnz 2b", turns = inout(reg) turns.max(1) => _,
            inout("r10") seed => kept, options(nomem, nostack));
    }
    kept == seed
}

#[cfg(test)]
mod tests {
    use super::hold;

    #[test]
    fn registers_keep_their_values_here() {
        for seed in 0..100 {
            assert!(hold(seed, 1000));
        }
    }
}
