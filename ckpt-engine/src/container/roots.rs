//! What the cgroup namespaces of programs show as their top.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use super::read_proc;
use crate::sys::namespace;

/// The cgroup that a namespace shows as its top, from what the container sees as its own.
/// `members` are processes in it; `None` if none of them is at or below that cgroup any more,
/// because then nothing tells.
pub(super) fn of(init: i32, members: &[i32], namespace: &OwnedFd) -> io::Result<Option<String>> {
    let Some(top) = top(&[init], &namespace_of(init)?)? else { return Ok(None) };
    let Some(root) = self::top(members, namespace)? else { return Ok(None) };
    let below = root.strip_prefix(top.trim_end_matches('/'));
    Ok(below.map(|below| below.trim_start_matches('/').to_owned()))
}

fn namespace_of(pid: i32) -> io::Result<OwnedFd> {
    Ok(std::fs::File::open(format!("/proc/{pid}/ns/cgroup"))?.into())
}

/// The top as the host sees it.
fn top(members: &[i32], namespace: &OwnedFd) -> io::Result<Option<String>> {
    let read = |pid: i32| read_proc(&format!("/proc/{pid}/cgroup"));
    for &pid in members {
        let Ok(outside) = read(pid) else { continue };
        let inside = namespace::in_cgroups_of(namespace.as_fd(), || read(pid))?;
        let (Some(outside), Some(inside)) = (unified(&outside), unified(&inside)) else { continue };
        if let Some(top) = remainder(outside, inside) {
            return Ok(Some(top.to_owned()));
        }
    }
    Ok(None)
}

/// The path in the cgroup v2 hierarchy.
fn unified(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

fn remainder<'a>(outside: &'a str, inside: &str) -> Option<&'a str> {
    match inside {
        "/" => Some(outside),
        _ if inside.starts_with("/..") => None,
        _ => outside.strip_suffix(inside),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_what_the_path_inside_lacks() {
        assert_eq!(remainder("/ve/101/a/b", "/b"), Some("/ve/101/a"));
        assert_eq!(remainder("/ve/101", "/"), Some("/ve/101"));
        assert_eq!(remainder("/ve/101/c", "/../c"), None);
    }
}
