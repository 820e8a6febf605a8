//! The kernel's description of its own types (BTF), as far as a few numbers are needed from it.

use std::{fs, io, sync::OnceLock};

const PATH: &str = "/sys/kernel/btf/vmlinux";
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;

/// The number under which programs call this function of the kernel, which there is from Linux
/// 6.9 on. Looked up once.
pub(crate) fn assign_request() -> io::Result<i32> {
    static NUMBER: OnceLock<Option<u32>> = OnceLock::new();
    let look_up = || Types::read().ok()?.function("bpf_sk_assign_tcp_reqsk").ok();
    NUMBER.get_or_init(look_up).map(u32::cast_signed).ok_or_else(unknown)
}

/// The types of the running kernel.
#[derive(Debug)]
pub(crate) struct Types {
    bytes: Vec<u8>,
    /// Where each type begins; they are numbered from one.
    places: Vec<usize>,
    /// Where the names begin.
    names: usize,
}

impl Types {
    /// Reads them: some megabytes.
    pub(crate) fn read() -> io::Result<Self> {
        Self::parse(fs::read(PATH)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let place = |at| word(&bytes, at).and_then(|word| usize::try_from(word).ok());
        let header = place(4)?;
        let mut at = header + place(8)?;
        let end = at + place(12)?;
        let names = header + place(16)?;
        let mut places = Vec::new();
        while at < end {
            let kind = word(&bytes, at + 4)?;
            places.push(at);
            let count = usize::try_from(kind & 0xffff).ok()?;
            at += 12 + extra(kind >> 24 & 0x1f) + each(kind >> 24 & 0x1f) * count;
        }
        Some(Self { bytes, places, names })
    }

    /// The number under which programs know this function.
    pub(crate) fn function(&self, name: &str) -> io::Result<u32> {
        let place = self.places.iter().position(|&at| self.is_named(at, FUNCTION, name));
        place.and_then(|place| u32::try_from(place + 1).ok()).ok_or_else(unknown)
    }

    /// How far from its beginning a structure has this member, in bytes.
    pub(crate) fn offset(&self, structure: &str, member: &str) -> io::Result<u32> {
        self.bit(structure, member).map(|bit| bit / 8)
    }

    /// How far from its beginning a structure has this member, in bits. Looks into members without
    /// a name as well; one of a member that is a structure itself is written as `outer.inner`.
    pub(crate) fn bit(&self, structure: &str, member: &str) -> io::Result<u32> {
        const DEPTH_MAX: usize = 8;
        let at = self.structure(structure)?;
        self.bit_below(at, member, DEPTH_MAX).ok_or_else(unknown)
    }

    /// The size of a structure in bytes.
    pub(crate) fn size(&self, structure: &str) -> io::Result<u32> {
        let at = self.structure(structure)?;
        word(&self.bytes, at + 8).ok_or_else(unknown)
    }

    fn structure(&self, name: &str) -> io::Result<usize> {
        let found = self.places.iter().find(|&&at| self.is_named(at, STRUCT, name));
        found.copied().ok_or_else(unknown)
    }

    fn bit_below(&self, at: usize, member: &str, depth: usize) -> Option<u32> {
        let head = word(&self.bytes, at + 4)?;
        if !matches!(head >> 24 & 0x1f, STRUCT | UNION) || depth == 0 {
            return None;
        }
        let (first, rest) = member.split_once('.').map_or((member, None), |it| (it.0, Some(it.1)));
        (0..usize::try_from(head & 0xffff).ok()?).find_map(|index| {
            let at = at + 12 + 12 * index;
            let (name, kind) = (word(&self.bytes, at)?, word(&self.bytes, at + 4)?);
            let bit = word(&self.bytes, at + 8)?;
            // With bit fields in the structure the upper byte is a width.
            let bit = if head >> 31 == 1 { bit & 0xff_ffff } else { bit };
            let inner = usize::try_from(kind).ok()?.checked_sub(1)?;
            let below = |member| self.bit_below(*self.places.get(inner)?, member, depth - 1);
            match rest {
                None if self.is_text(name, first) => Some(bit),
                Some(rest) if self.is_text(name, first) => Some(bit + below(rest)?),
                _ if self.is_text(name, "") => Some(bit + below(member)?),
                _ => None,
            }
        })
    }

    fn is_named(&self, at: usize, kind: u32, name: &str) -> bool {
        word(&self.bytes, at + 4).is_some_and(|word| word >> 24 & 0x1f == kind)
            && word(&self.bytes, at).is_some_and(|place| self.is_text(place, name))
    }

    fn is_text(&self, place: u32, text: &str) -> bool {
        let found = usize::try_from(place).ok().and_then(|at| self.bytes.get(self.names + at..));
        let rest = found.and_then(|found| found.strip_prefix(text.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn unknown() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

/// What follows a type once: integers, arrays, variables, tags.
fn extra(kind: u32) -> usize {
    match kind {
        1 | 14 | 17 => 4,
        3 => 12,
        _ => 0,
    }
}

/// What follows it for each of its members: of structures, unions, enumerations and so on.
fn each(kind: u32) -> usize {
    match kind {
        4 | 5 | 15 | 19 => 12,
        6 | 13 => 8,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_and_members_are_found_and_others_are_not() {
        let types = Types::read().unwrap();
        assert!(types.function("bpf_sk_assign_tcp_reqsk").expect("Linux 6.9 or newer") > 0);
        assert!(types.function("no_such_function").is_err());
        assert_eq!(types.offset("list_head", "next").unwrap(), 0);
        assert_eq!(types.offset("list_head", "prev").unwrap(), 8);
        // In a structure without a name.
        assert!(types.offset("kioctx", "reqs_available").unwrap() > 0);
        assert!(types.offset("kioctx", "no_such_member").is_err());
        assert_eq!(types.size("list_head").unwrap(), 16);
        // In a member that is a structure.
        let inner = types.bit("tcp_sock", "rx_opt.mss_clamp").unwrap();
        let outer = types.bit("tcp_sock", "rx_opt").unwrap();
        assert_eq!(inner - outer, types.bit("tcp_options_received", "mss_clamp").unwrap());
        assert!(types.bit("tcp_sock", "rx_opt.no_such_member").is_err());
        // A member of one bit.
        let bit = types.bit("signal_struct", "has_child_subreaper").unwrap();
        assert_eq!(types.bit("signal_struct", "is_child_subreaper").unwrap() + 1, bit);
    }

    #[test]
    fn damage_is_none() {
        let bytes = fs::read(PATH).unwrap();
        assert!(Types::parse(bytes[..100].to_vec()).is_none());
        assert!(Types::parse(Vec::new()).is_none());
    }
}
