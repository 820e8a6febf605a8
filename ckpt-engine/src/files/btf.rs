//! The kernel's description of its own types (BTF), as far as one number is needed from it.

use std::{fs, io, sync::OnceLock};

const PATH: &str = "/sys/kernel/btf/vmlinux";
const FUNCTION: u32 = 12;

/// The number under which programs call this function of the kernel; none where there is no such
/// function. Looked up once.
pub(super) fn assign_request() -> io::Result<i32> {
    static NUMBER: OnceLock<Option<i32>> = OnceLock::new();
    let look_up = || {
        let bytes = fs::read(PATH).ok()?;
        function(&bytes, "bpf_sk_assign_tcp_reqsk")
    };
    NUMBER.get_or_init(look_up).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Goes through all types, which are numbered from one in the order of the file.
fn function(bytes: &[u8], name: &str) -> Option<i32> {
    let place = |at| word(bytes, at).and_then(|word| usize::try_from(word).ok());
    let header = place(4)?;
    let mut at = header + place(8)?;
    let end = at + place(12)?;
    let names = bytes.get(header + place(16)?..)?;
    let mut number = 1;
    while at < end {
        let (kind, count) = (word(bytes, at + 4)? >> 24 & 0x1f, word(bytes, at + 4)? & 0xffff);
        if kind == FUNCTION {
            let text = names.get(place(at)?..)?;
            if text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)) {
                return Some(number);
            }
        }
        at += 12 + extra(kind) + each(kind) * usize::try_from(count).ok()?;
        number += 1;
    }
    None
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
    fn the_function_is_found_and_damage_is_none() {
        let number = assign_request().expect("a kernel of 6.9 or newer");
        assert!(number > 0);
        let bytes = fs::read(PATH).unwrap();
        assert_eq!(function(&bytes, "no_such_function"), None);
        assert_eq!(function(&bytes[..100], "bpf_sk_assign_tcp_reqsk"), None);
        assert_eq!(function(&[], "bpf_sk_assign_tcp_reqsk"), None);
    }
}
