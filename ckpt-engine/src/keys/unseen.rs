//! Keys where the kernel's own records of them cannot be read: what can be found out is that there
//! are some, so that a move does not lose them without a word.
//!
//! The kernel lists keys to those who may see them (proc_keys(5)): to their users, unless a user has
//! taken that away. How many keys a user has it tells in any case (proc_key_users(5)).

use std::{collections::BTreeMap, fs, io};

use ckpt_format::blocker::Blocker;

use crate::{capture::IdMap, sys::namespace::as_user};

/// For how many users the list is read. It can be long, and a VE has as many users as it likes.
const USERS_MAX: usize = 32;
/// How many keys are named.
const NAMED_MAX: usize = 16;

/// What a service of systemd finds in its session keyring, and in its environment as well. Were it
/// counted, no VE with systemd could be moved.
const OF_SYSTEMD: &str = "invocation_id";

/// One key in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    user: u32,
    lives: bool,
    kind: String,
    description: String,
}

impl Line {
    /// "1a2b3c4d I--Q---     1 perm 3f010000  1000  1000 user      ticket: 14".
    fn parse(line: &str) -> Option<(u32, Self)> {
        let mut words = line.split_whitespace();
        let serial = u32::from_str_radix(words.next()?, 16).ok()?;
        let flags = words.next()?;
        let expires = words.nth(1)?;
        let user = words.nth(1)?.parse().ok()?;
        let kind = words.nth(1)?.to_owned();
        // The description may hold blanks.
        let rest = words.collect::<Vec<_>>().join(" ");
        let description = rest.rsplit_once(": ").map_or(rest.as_str(), |it| it.0).to_owned();
        // Neither revoked, dead, negative nor invalidated.
        let lives =
            flags.starts_with('I') && !flags.contains(['R', 'D', 'N', 'i']) && expires != "expd";
        Some((serial, Self { user, lives, kind, description }))
    }

    /// Whether somebody would miss it.
    fn counts(&self) -> bool {
        /// Of sessions, threads, processes and users, without what they hold.
        const PLAIN: [&str; 6] = ["_ses", "_tid", "_pid", "_uid.", "_uid_ses.", "_persistent."];
        let name = self.description.as_str();
        let is_plain = match self.kind.as_str() {
            "keyring" => name.starts_with('.') || PLAIN.iter().any(|plain| name.starts_with(plain)),
            "user" => name == OF_SYSTEMD,
            _ => false,
        };
        self.lives && !is_plain
    }
}

/// The keys of the users of a VE, which cannot be read.
pub(crate) fn unseen(ids: IdMap) -> io::Result<Vec<Blocker>> {
    let counts = counts(&fs::read_to_string("/proc/key-users")?, ids);
    let mut listed = BTreeMap::new();
    for user in counts.keys().take(USERS_MAX) {
        let text = as_user(*user, || fs::read_to_string("/proc/keys"))?;
        listed.extend(text.lines().filter_map(Line::parse));
    }
    Ok(blockers(&counts, &listed, ids))
}

/// How many keys each user of the VE has, by the user's number on the host.
fn counts(text: &str, ids: IdMap) -> BTreeMap<u32, usize> {
    let ours = ids.base..ids.base.saturating_add(ids.count);
    let count = |line: &str| -> Option<(u32, usize)> {
        let (user, rest) = line.split_once(':')?;
        let count = rest.split_whitespace().nth(1)?.split_once('/')?.0;
        Some((user.trim().parse().ok()?, count.parse().ok()?))
    };
    text.lines().filter_map(count).filter(|(user, _)| ours.contains(user)).collect()
}

fn blockers(
    counts: &BTreeMap<u32, usize>,
    listed: &BTreeMap<u32, Line>,
    ids: IdMap,
) -> Vec<Blocker> {
    let mut objects = Vec::new();
    for line in listed.values().filter(|it| counts.contains_key(&it.user) && it.counts()) {
        let Line { user, kind, description, .. } = line;
        let user = ids.inside((*user).into());
        objects.push(format!("the key {description:?} of the type {kind}, of user {user}"));
    }
    for (user, count) in counts {
        let hidden = count.saturating_sub(listed.values().filter(|it| it.user == *user).count());
        if hidden > 0 {
            let user = ids.inside((*user).into());
            objects.push(format!("{hidden} keys of user {user} that only their holders see"));
        }
    }
    let more = objects.len().saturating_sub(NAMED_MAX);
    objects.truncate(NAMED_MAX);
    if more > 0 {
        objects.push(format!("{more} more keys"));
    }
    let blocker = |object| Blocker {
        pid: 1,
        command: "init".to_owned(),
        fd: None,
        object,
        hint:
            "unlink it with keyctl(1), end the programs that have it, or use a kernel that tells \
               what keys hold (CONFIG_DEBUG_INFO_BTF)"
                .to_owned(),
    };
    objects.into_iter().map(blocker).collect()
}

#[cfg(test)]
mod tests {
    use std::{ffi::CStr, sync::mpsc::channel, thread};

    use super::*;
    use crate::sys::{
        keys::{set_owner, set_permissions},
        program::keys::{OF_THREAD, add},
    };

    const IDS: IdMap = IdMap { base: 3_000_000, count: 65_536 };

    fn objects() -> Vec<String> {
        unseen(IDS).unwrap().into_iter().map(|blocker| blocker.object).collect()
    }

    /// Does this in a thread of its own, whose keys end with it, one step after the other.
    fn hold(steps: Vec<Box<dyn FnOnce() + Send>>) -> impl FnMut() {
        let ((go, going), (tell, told)) = (channel::<()>(), channel());
        thread::spawn(move || {
            for step in steps {
                going.recv().unwrap();
                step();
                tell.send(()).unwrap();
            }
            // Until nobody wants them any more.
            let _ = going.recv();
        });
        move || {
            go.send(()).unwrap();
            told.recv().unwrap();
        }
    }

    fn give(kind: &CStr, description: &CStr) -> i32 {
        let payload: &[u8] = if kind == c"keyring" { b"" } else { b"secret" };
        let key = add(kind, description, payload, OF_THREAD).unwrap();
        set_owner(key, IDS.base + 17, u32::MAX).unwrap();
        key
    }

    #[test]
    fn keys_that_cannot_be_read_are_named() {
        let mut next = hold(vec![
            Box::new(|| _ = give(c"user", c"invocation_id")),
            Box::new(|| _ = give(c"keyring", c"a ring")),
            Box::new(|| _ = give(c"logon", c"test: of a disk")),
            // With permissions of the possessor alone.
            Box::new(|| set_permissions(give(c"user", c"hidden"), 0x3f00_0000).unwrap()),
        ]);
        assert_eq!(objects(), [""; 0]);
        next();
        assert_eq!(objects(), [""; 0], "only systemd's");
        next();
        let ring = "the key \"a ring\" of the type keyring, of user 17";
        assert_eq!(objects(), [ring]);
        next();
        let disk = "the key \"test: of a disk\" of the type logon, of user 17";
        let mut found = objects();
        found.sort_unstable();
        assert_eq!(found, [ring, disk]);
        next();
        let found = objects();
        assert_eq!(found.len(), 3);
        assert_eq!(found[2], "1 keys of user 17 that only their holders see");
    }

    #[test]
    fn a_line_of_the_list_is_understood() {
        let line = "2f3a I--Q---  2 perm 3f010000  1000  1001 user      a b: c: 14";
        let (serial, line) = Line::parse(line).unwrap();
        assert_eq!((serial, line.user, line.lives), (0x2f3a, 1000, true));
        assert_eq!((line.kind.as_str(), line.description.as_str()), ("user", "a b: c"));
        assert!(line.counts());
        for gone in ["IR-Q--- 1 perm", "I-DQ--- 1 perm", "I--Q-N- 1 perm", "I--Q--- 1 expd"] {
            let line = format!("2f3a {gone} 3f010000 0 0 user x: 1");
            assert!(!Line::parse(&line).unwrap().1.counts(), "{line}");
        }
        assert_eq!(Line::parse("no such line"), None);
    }
}
