//! An object in the VE that cannot be moved, found before anything starts.

use serde::{Deserialize, Serialize};

/// One reason why a VE cannot be captured now, with what the operator needs to act on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The process that holds the object, as numbered inside the VE.
    pub pid: i32,
    /// The command name of that process.
    pub command: String,
    /// The file descriptor, where the object is one.
    pub fd: Option<i32>,
    /// What it is, e.g. `io_uring ring` or `process traced by pid 77`.
    pub object: String,
    /// What the operator can do about it.
    pub hint: String,
}

impl std::fmt::Display for Blocker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)?;
        if let Some(fd) = self.fd {
            write!(f, " fd {fd}")?;
        }
        write!(f, ": {}; {}", self.object, self.hint)
    }
}

/// Blockers for people, a line for each; many of one process that need the same are one line.
pub fn lines(blockers: &[Blocker]) -> Vec<String> {
    const ALIKE_MAX: usize = 3;
    let mut lines: Vec<String> = Vec::new();
    let alike = |a: &Blocker, b: &Blocker| a.pid == b.pid && a.hint == b.hint;
    for (place, blocker) in blockers.iter().enumerate() {
        if blockers[..place].iter().any(|earlier| alike(earlier, blocker)) {
            continue;
        }
        let group: Vec<_> = blockers[place..].iter().filter(|it| alike(it, blocker)).collect();
        if group.len() <= ALIKE_MAX {
            lines.extend(group.iter().map(ToString::to_string));
            continue;
        }
        let Blocker { pid, command, object, hint, .. } = blocker;
        let more = group.len() - 1;
        lines.push(format!("pid {pid} ({command}): {object}, and {more} more like it; {hint}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_of_a_kind_are_one_line() {
        let blocker = |pid, fd| Blocker {
            pid,
            command: "java".to_owned(),
            fd: Some(fd),
            object: format!("file {fd}"),
            hint: "close it".to_owned(),
        };
        let mut all: Vec<_> = (0..30).map(|fd| blocker(7, fd)).collect();
        all.push(blocker(8, 1));
        let lines = lines(&all);
        assert_eq!(
            lines,
            [
                "pid 7 (java): file 0, and 29 more like it; close it",
                "pid 8 (java) fd 1: file 1; close it"
            ]
        );
    }
}
