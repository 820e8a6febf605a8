//! The extended registers as the kernel keeps them, and as ptrace(2) shows them.
//!
//! The kernel saves with XSAVES: only components that are in use, one behind the other. Everybody
//! else sees the standard form, where each component has its place (Intel SDM volume 1, 13.4).

use std::arch::x86_64::__cpuid_count;

const LEGACY: usize = 512;
const HEADER: usize = 64;
const COMPACTED: u64 = 1 << 63;
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const KEYS: usize = 9;
/// What the hardware begins with: the control word of the x87, and MXCSR with its mask.
const FIRST_CONTROL_WORD: u16 = 0x37f;
const FIRST_MXCSR: u32 = 0x1f80;

/// Where a component is.
#[derive(Clone, Copy, Debug, Default)]
struct Component {
    size: usize,
    offset: usize,
    aligned: bool,
}

/// How extended registers look on this processor.
#[derive(Debug)]
pub(super) struct Form {
    components: [Component; 63],
    /// As ptrace shows the state of a process of our own: the size, the part that is the same for
    /// all (`sw_reserved`), the mask of MXCSR.
    sample: Vec<u8>,
}

impl Form {
    /// `sample` is what ptrace(2) shows of any process.
    pub(super) fn new(sample: Vec<u8>) -> Option<Self> {
        if sample.len() < LEGACY + HEADER {
            return None;
        }
        let mut components = [Component::default(); 63];
        for (number, component) in components.iter_mut().enumerate().skip(2) {
            // The leaf exists wherever the kernel keeps states by XSAVE.
            let leaf = __cpuid_count(0xd, number as u32);
            *component = Component {
                size: leaf.eax as usize,
                offset: leaf.ebx as usize,
                aligned: leaf.ecx & 2 != 0,
            };
        }
        Some(Self { components, sample })
    }

    /// How many bytes the kernel may keep for one thread: all components that any thread can have.
    pub(super) fn len_max() -> u32 {
        let user = __cpuid_count(0xd, 0).ecx;
        let compacted = __cpuid_count(0xd, 1).ebx;
        // Each component can be moved by its alignment.
        user.max(compacted) + HEADER as u32
    }

    /// What ptrace would show, up to the last component that is in use. `None` if `kept` is too
    /// short for what it says it holds.
    pub(super) fn standard(&self, kept: &[u8], keys: Option<u32>) -> Option<Vec<u8>> {
        let word = |at: usize| {
            let bytes = kept.get(at..at + 8)?.try_into().ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let (present, form) = (word(LEGACY)?, word(LEGACY + 8)?);
        let mut out = vec![0; LEGACY + HEADER];
        let mut copy = |to: usize, from: usize, len: usize| {
            put(&mut out, to, kept.get(from..from + len)?, self.sample.len())
        };
        if present & X87 != 0 {
            copy(0, 0, 24)?;
            copy(32, 32, 128)?;
        }
        if present & (SSE | AVX) != 0 {
            copy(24, 24, 8)?;
        }
        if present & SSE != 0 {
            copy(160, 160, 256)?;
        }
        let mut user = present & (X87 | SSE);
        let mut next = LEGACY + HEADER;
        for (number, component) in self.components.iter().enumerate().skip(2) {
            let bit = 1u64 << number;
            let from = if form & COMPACTED == 0 {
                component.offset
            } else if form & bit != 0 {
                let here = if component.aligned { next.next_multiple_of(64) } else { next };
                next = here + component.size;
                here
            } else {
                continue;
            };
            // States of the supervisor have no place in the standard form.
            if present & bit != 0 && component.offset != 0 {
                copy(component.offset, from, component.size)?;
                user |= bit;
            }
        }
        if let (Some(keys), component) = (keys, self.components[KEYS])
            && component.offset != 0
        {
            put(&mut out, component.offset, &keys.to_le_bytes(), self.sample.len())?;
        }
        if present & X87 == 0 {
            out[..2].copy_from_slice(&FIRST_CONTROL_WORD.to_le_bytes());
        }
        if present & (SSE | AVX) == 0 {
            out[24..28].copy_from_slice(&FIRST_MXCSR.to_le_bytes());
            out[28..32].copy_from_slice(&self.sample[28..32]);
        }
        out[464..LEGACY].copy_from_slice(&self.sample[464..LEGACY]);
        out[LEGACY..LEGACY + 8].copy_from_slice(&user.to_le_bytes());
        Some(out)
    }
}

/// Puts bytes where they belong, behind zeros if need be, but not beyond `len_max`.
fn put(out: &mut Vec<u8>, to: usize, bytes: &[u8], len_max: usize) -> Option<()> {
    let end = to.checked_add(bytes.len()).filter(|end| *end <= len_max)?;
    if out.len() < end {
        out.resize(end, 0);
    }
    out.get_mut(to..end)?.copy_from_slice(bytes);
    Some(())
}
