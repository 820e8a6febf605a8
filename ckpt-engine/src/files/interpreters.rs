//! Which programs run files of which kinds: binfmt_misc, of which each user namespace has its own.
//! The file system tells all that is registered in it; on the target it is registered anew by the
//! VE's first process, before anything in the file system is opened.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::AsFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use ckpt_format::files::{Interpreter, Interpreters, Pattern};

use super::{Argument, Remote, rebuild::RebuildError};
use crate::{container::binary_formats, sys::descriptor};

/// `BINFMTFS_MAGIC` of linux/magic.h.
const MAGIC: i64 = 0x4249_4e4d;

/// All that is registered in the VE with this first process.
pub(super) fn capture(init: i32) -> io::Result<Vec<Interpreters>> {
    let points = binary_formats(init)?;
    points.into_iter().map(|point| read(init, point.into_bytes())).collect()
}

fn read(init: i32, point: Vec<u8>) -> io::Result<Interpreters> {
    let inside = OsStr::from_bytes(point.strip_prefix(b"/").unwrap_or(&point));
    let directory = Path::new(&format!("/proc/{init}/root")).join(inside);
    let opened = fs::File::open(&directory)?;
    if descriptor::file_system(opened.as_fd())? != MAGIC {
        return Err(io::Error::other("binfmt_misc is hidden by another mount"));
    }
    let enabled = fs::read(directory.join("status"))? == b"enabled\n";
    let mut entries = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let name = entry?.file_name().into_vec();
        if name == b"register" || name == b"status" {
            continue;
        }
        let text = fs::read(directory.join(OsStr::from_bytes(&name)))?;
        let entry = parse(name, &text);
        entries.push(entry.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?);
    }
    // The newest is listed first.
    entries.reverse();
    Ok(Interpreters { point, enabled, entries })
}

/// What an entry says of itself, line by line.
fn parse(name: Vec<u8>, text: &[u8]) -> Option<Interpreter> {
    let mut lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let enabled = lines.next()? == b"enabled";
    let program = lines.next()?.strip_prefix(b"interpreter ")?.to_vec();
    let flags = String::from_utf8(lines.next()?.strip_prefix(b"flags: ")?.to_vec()).ok()?;
    let place = lines.next()?;
    let pattern = match place.strip_prefix(b"extension .") {
        Some(extension) => Pattern::Extension(extension.to_vec().into()),
        None => {
            let offset = std::str::from_utf8(place.strip_prefix(b"offset ")?).ok()?;
            let magic = bytes(lines.next()?.strip_prefix(b"magic ")?)?;
            let mask = match lines.next() {
                Some(mask) => bytes(mask.strip_prefix(b"mask ")?)?,
                None => Vec::new(),
            };
            let offset = offset.parse().ok()?;
            Pattern::Magic { offset, magic: magic.into(), mask: mask.into() }
        }
    };
    Some(Interpreter { name, enabled, program, flags, pattern })
}

/// Two digits for each byte.
fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(byte).collect()
}

/// The line by which an entry is registered. It is split at a character that is nowhere else in it.
fn line(entry: &Interpreter) -> Option<Vec<u8>> {
    let (kind, offset, magic, mask) = match &entry.pattern {
        Pattern::Extension(extension) => (b'E', String::new(), extension.to_vec(), Vec::new()),
        Pattern::Magic { offset, magic, mask } => {
            (b'M', offset.to_string(), escaped(magic), escaped(mask))
        }
    };
    let parts: [&[u8]; 7] = [
        &entry.name,
        &[kind],
        offset.as_bytes(),
        &magic,
        &mask,
        &entry.program,
        entry.flags.as_bytes(),
    ];
    let is_free = |byte: &u8| !parts.iter().any(|part| part.contains(byte));
    let split = b':'..=u8::MAX;
    let split = split.chain(b'!'..b'0').find(is_free)?;
    let mut line = vec![split];
    for (place, part) in parts.iter().enumerate() {
        line.extend_from_slice(part);
        if place + 1 < parts.len() {
            line.push(split);
        }
    }
    Some(line)
}

/// The kernel takes a byte as it is, or by its number.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let one = |&byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => vec![byte],
        _ => format!("\\x{byte:02x}").into_bytes(),
    };
    bytes.iter().flat_map(one).collect()
}

/// Registers everything anew.
pub(super) fn rebuild(all: &[Interpreters], remote: &mut dyn Remote) -> Result<(), RebuildError> {
    for one in all {
        let path = |name: &[u8]| [&one.point, &b"/"[..], name, b"\0"].concat();
        for entry in &one.entries {
            let line = line(entry).ok_or(RebuildError::Damaged)?;
            write(&path(b"register"), &line, remote)?;
            if !entry.enabled {
                write(&path(&entry.name), b"0", remote)?;
            }
        }
        if !one.enabled {
            write(&path(b"status"), b"0", remote)?;
        }
    }
    Ok(())
}

fn write(path: &[u8], text: &[u8], remote: &mut dyn Remote) -> Result<(), RebuildError> {
    let value = Argument::Value;
    let none = || value(0);
    let mut call = |number: i64, arguments: [Argument<'_>; 3]| {
        let [first, second, third] = arguments;
        remote.call(1, number, [first, second, third, none(), none(), none()]).map_err(|source| {
            RebuildError::Remote { pid: 1, object: "interpreter of binfmt_misc", source }
        })
    };
    let flags = value((libc::O_WRONLY | libc::O_CLOEXEC) as u64);
    let fd = call(libc::SYS_open, [Argument::In(path), flags, none()])?;
    let written = call(libc::SYS_write, [value(fd), Argument::In(text), value(text.len() as u64)]);
    call(libc::SYS_close, [value(fd), none(), none()])?;
    written.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let entry = parse(b"name".to_vec(), text.as_bytes()).unwrap();
        let line = line(&entry).unwrap();
        assert_eq!(String::from_utf8_lossy(&line), expected);
    }

    #[test]
    fn what_an_entry_says_is_what_registers_it() {
        check(
            "enabled\ninterpreter /bin/true\nflags: F\nextension .foo\n",
            ":name:E::foo::/bin/true:F",
        );
        check(
            "disabled\ninterpreter /bin/true\nflags: POC\noffset 3\nmagic 0061ff\nmask ffff0f\n",
            ":name:M:3:\\x00a\\xff:\\xff\\xff\\x0f:/bin/true:POC",
        );
        check(
            "enabled\ninterpreter /a:b;c\nflags: \noffset 0\nmagic 7f\n",
            "<name<M<0<\\x7f<</a:b;c<",
        );
    }

    #[test]
    fn what_is_no_entry_is_none() {
        for text in
            ["", "enabled\n", "enabled\ninterpreter /bin/true\nflags: \noffset x\nmagic 0\n"]
        {
            assert_eq!(parse(b"name".to_vec(), text.as_bytes()), None);
        }
    }
}
