//! Files of `/proc` of a process or thread that is gone: reading them is an error (ESRCH), and nothing
//! opens them again. On the target a process gets that number for as long as it takes to open one.

use std::{ffi::OsStr, fs, io, os::fd::AsFd, os::unix::ffi::OsStrExt};

use super::rebuild::Target;
use crate::sys::{namespace, task};

/// Which process a path of `/proc` is about, what stands behind its number, and of a thread its own.
struct Parts<'a> {
    process: i32,
    thread: Option<i32>,
    rest: &'a [u8],
}

/// "/proc/7/stat", "/proc/7/task/8/stat".
fn parts(path: &[u8]) -> Option<Parts<'_>> {
    let (process, rest) = number(path.strip_prefix(b"/proc/")?)?;
    match rest.strip_prefix(b"/task/").and_then(number) {
        Some((thread, rest)) => Some(Parts { process, thread: Some(thread), rest }),
        None => Some(Parts { process, thread: None, rest }),
    }
}

/// A number at the start, and what follows.
fn number(text: &[u8]) -> Option<(i32, &[u8])> {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (rest.is_empty() || rest.starts_with(b"/")).then_some((number, rest))
}

/// Whether a path in the VE with this first process is about a process or thread that is gone.
pub(super) fn is(init: i32, path: &[u8]) -> bool {
    let Some(Parts { rest, .. }) = parts(path) else { return false };
    let directory = &path[..path.len() - rest.len()];
    let inside = format!("/proc/{init}/root{}", OsStr::from_bytes(directory).display());
    matches!(fs::symlink_metadata(inside), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Opens such a path in the mounts of the calling thread.
pub(super) fn open<T: Send>(
    target: &Target,
    path: &[u8],
    open: impl FnOnce(&[u8]) -> io::Result<T> + Send,
) -> io::Result<T> {
    let Parts { process, thread, rest } = parts(path).ok_or(io::ErrorKind::InvalidData)?;
    // The thread of a process that lives is the first of another one for now.
    let lives = target.processes.contains_key(&process);
    let number = if lives { thread.unwrap_or(process) } else { process };
    let mut path = format!("/proc/{number}").into_bytes();
    if thread.is_some() {
        path.extend(format!("/task/{number}").bytes());
    }
    path.extend(rest);
    let init = target.processes.get(&1).ok_or(io::ErrorKind::NotFound)?;
    let init = task::pidfd_open(*init)?;
    namespace::beside_process(init.as_fd(), number, || open(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        let check = |path: &[u8], expected: Option<(i32, Option<i32>, &str)>| {
            let found = parts(path);
            let found = found.map(|it| (it.process, it.thread, it.rest.to_vec()));
            let expected = expected.map(|it| (it.0, it.1, it.2.as_bytes().to_vec()));
            assert_eq!(found, expected, "{}", OsStr::from_bytes(path).display());
        };
        check(b"/proc/7/stat", Some((7, None, "/stat")));
        check(b"/proc/7", Some((7, None, "")));
        check(b"/proc/7/task/8/ns/net", Some((7, Some(8), "/ns/net")));
        check(b"/proc/7/task", Some((7, None, "/task")));
        check(b"/proc/7x/stat", None);
        check(b"/proc/99999999999/stat", None);
        check(b"/proc/self", None);
        check(b"/sys/7", None);
    }

    #[test]
    fn a_number_is_gone_with_its_process() {
        let own = std::process::id();
        assert!(!is(own.cast_signed(), format!("/proc/{own}/stat").as_bytes()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(is(own.cast_signed(), format!("/proc/{}/stat", child.id()).as_bytes()));
        assert!(!is(own.cast_signed(), b"/proc/meminfo"));
    }
}
