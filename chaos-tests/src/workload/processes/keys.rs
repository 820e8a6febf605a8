//! Keys: session keyrings of one's own and in common, those of users, processes and threads.

use std::ffi::{CStr, CString};
use std::fs;
use std::sync::mpsc::channel;
use std::time::Duration;

use ckpt_engine::sys::program::control::set_thread_user;
use ckpt_engine::sys::program::keys::{
    self, OF_PROCESS, OF_SESSION, OF_THREAD, OF_USER, add, describe, join_session, link, read,
};
use nix::unistd::{Uid, setresuid};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const USER: &CStr = c"user";
const KEYRING: &CStr = c"keyring";

/// For so many seconds, of which /proc/keys shows the days.
const A_DAY_AND_MORE: u32 = 100_000;
/// `KEY_POS_ALL`, `KEY_USR_VIEW`
const VISIBLE: u32 = 0x3f01_0000;
/// `KEY_POS_VIEW`, `KEY_POS_READ`, `KEY_POS_SEARCH`, `KEY_GRP_VIEW`
const READABLE: u32 = 0x0b00_0100;

/// So often a note may be found unchanged, by somebody who looks as often as it is written.
const PATIENCE: u32 = 500;

/// What a key is like, and everything in it: its number says nothing.
fn portrait(key: i32, listed: &str, into: &mut Vec<String>) -> Result<(), Failure> {
    let about = match describe(key) {
        Ok(about) => about,
        Err(error) => {
            into.push(error.to_string());
            return Ok(());
        }
    };
    let number = format!("{key:08x} ");
    let left = listed.lines().find(|line| line.starts_with(&number));
    let left = left.and_then(|line| line.split_whitespace().nth(3)).unwrap_or_default();
    // The days of this one are counted from when it was last asked for.
    let left = if about.contains("_persistent") { "" } else { left };
    let contents = read(key);
    let is_keyring = about.starts_with("keyring;");
    let text = match &contents {
        Ok(contents) if !is_keyring => String::from_utf8_lossy(contents).into_owned(),
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    into.push(format!("{about} {left} {text}"));
    if !is_keyring {
        return Ok(());
    }
    let mut inner = Vec::new();
    for number in contents?.chunks_exact(4) {
        let mut one = Vec::new();
        let number = i32::from_ne_bytes([number[0], number[1], number[2], number[3]]);
        portrait(number, listed, &mut one)?;
        inner.push(one);
    }
    inner.sort();
    into.extend(inner.into_iter().flatten().map(|line| format!("  {line}")));
    Ok(())
}

/// Looks at keys of one keyring in several calls, during which they keep their numbers: a move gives
/// all keys others.
fn under_same_numbers<T>(
    keyring: i32,
    look: impl Fn() -> Result<T, Failure>,
) -> Result<T, Failure> {
    loop {
        let before = keys::keyring(keyring)?;
        let found = look();
        if keys::keyring(keyring)? == before {
            return found;
        }
    }
}

/// What is in a key of the session keyring.
fn text_of(name: &CStr) -> Result<Vec<u8>, Failure> {
    under_same_numbers(OF_SESSION, || {
        let key = keys::search(OF_SESSION, USER, name)
            .map_err(|error| Failure::new(format!("no key {name:?} is found: {error}")))?;
        Ok(read(key)?)
    })
}

fn portraits(keyrings: &[i32]) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for &keyring in keyrings {
        all.extend(under_same_numbers(keyring, || {
            let listed = fs::read_to_string("/proc/keys")?;
            let mut lines = Vec::new();
            portrait(keys::keyring(keyring)?, &listed, &mut lines)?;
            Ok(lines)
        })?);
    }
    Ok(all)
}

/// A session keyring with keys of all kinds: large, secret, for a while, in
/// another keyring, in two, and revoked.
pub(super) fn session(context: &mut Context) -> Result<(), Failure> {
    join_session(Some(c"workload"))?;
    add(USER, c"plain", b"some text", OF_SESSION)?;
    // A user may have 20,000 bytes, which three copies on one host share for a moment.
    add(USER, c"large", &[7; 3000], OF_SESSION)?;
    add(c"logon", c"login:secret", b"nobody may read this", OF_SESSION)?;
    let timed = add(USER, c"for a day", b"later", OF_SESSION)?;
    keys::set_timeout(timed, A_DAY_AND_MORE)?;
    let strict = add(USER, c"strict", b"look", OF_SESSION)?;
    let mut ring = OF_SESSION;
    for name in [c"one", c"two", c"three"] {
        ring = add(KEYRING, name, b"", ring)?;
        add(USER, c"plain", name.to_bytes(), ring)?;
    }
    link(timed, ring)?;
    for number in 0..20 {
        let name = CString::new(format!("number {number}")).unwrap_or_default();
        add(USER, &name, name.as_bytes(), ring)?;
    }
    let revoked = add(USER, c"revoked", b"gone", ring)?;
    keys::revoke(revoked)?;
    keys::set_permissions(strict, READABLE)?;
    keys::set_permissions(ring, VISIBLE)?;
    let look = || {
        let found = keys::search(OF_SESSION, c"logon", c"login:secret").is_ok();
        let plain = text_of(c"plain")?;
        let mut lines = portraits(&[OF_SESSION])?;
        // The kernel removes it some time later.
        lines.retain(|line| !line.contains("revoked"));
        Ok((found, plain, lines))
    };
    keep(context, "a session keyring", look, || {
        let plain = keys::search(OF_SESSION, USER, c"plain")?;
        Ok(keys::update(plain, b"other text")?)
    })
}

/// Services that each have a keyring, all with the same names, and a child that has that of its
/// parent: what one of them adds the other sees.
pub(super) fn services(context: &mut Context) -> Result<(), Failure> {
    let progress = context.progress.clone();
    let mut children = Vec::new();
    for (number, name) in ["first", "second", "third"].into_iter().enumerate() {
        join_session(None)?;
        add(USER, c"invocation_id", name.as_bytes(), OF_SESSION)?;
        for helper in [false, true] {
            let progress = progress.clone();
            let user = if number == 2 { 1000 } else { 0 };
            children.push(Child::start(context, name, move |stop| {
                setresuid(Uid::from_raw(user), Uid::from_raw(user), Uid::from_raw(user))?;
                let (mut round, mut last, mut same_as_last) = (0u64, 0, 0);
                while !stop.wait(Duration::from_millis(20))? {
                    let id = text_of(c"invocation_id")?;
                    same("the key of a service", String::from_utf8_lossy(&id), name.into())?;
                    same("its keyring", describe(OF_SESSION)?.ends_with(";_ses"), true)?;
                    progress.count();
                    if helper {
                        round += 1;
                        add(USER, c"note", &round.to_ne_bytes(), OF_SESSION)?;
                        if progress.plant() {
                            join_session(None)?;
                        }
                        continue;
                    }
                    // What its helper has written last, sooner or later.
                    let note = text_of(c"note");
                    let now = note.ok().and_then(|it| it.first_chunk().copied());
                    let now = now.map_or(0, u64::from_ne_bytes);
                    same_as_last = if now == last { same_as_last + 1 } else { 0 };
                    ensure(now >= last, || format!("a note of {now} after one of {last}"))?;
                    ensure(same_as_last < PATIENCE, || "a note is not renewed".to_owned())?;
                    last = now;
                }
                Ok(())
            })?);
        }
    }
    while context.step(Duration::from_millis(20))? {
        for child in &children {
            child.check()?;
        }
    }
    children.into_iter().try_for_each(Child::finish)
}

/// Keyrings of users, of a process and of threads.
pub(super) fn users(context: &mut Context) -> Result<(), Failure> {
    let (mut ends, mut looks) = (Vec::new(), Vec::new());
    join_session(None)?;
    add(USER, c"of root", b"root's", OF_USER)?;
    let persistent = keys::persistent(u32::MAX, OF_SESSION)?;
    add(USER, c"ticket", b"for three days", persistent)?;
    add(USER, c"of the process", b"common", OF_PROCESS)?;
    for number in 0..3u32 {
        let (ask, asked) = channel::<()>();
        let (tell, told) = channel();
        let work = move || -> Result<(), Failure> {
            set_thread_user(0, 2000 + number, 0)?;
            add(USER, c"own", number.to_string().as_bytes(), OF_THREAD)?;
            while asked.recv().is_ok() {
                // A thread that has not looked cannot tell.
                let _ = tell.send(portraits(&[OF_THREAD, OF_PROCESS]));
            }
            Ok(())
        };
        std::thread::spawn(work);
        ends.push(ask);
        looks.push(told);
    }
    let look = || {
        let mut all = vec![portraits(&[OF_USER, OF_SESSION, OF_PROCESS])?];
        for (ask, told) in ends.iter().zip(&looks) {
            ask.send(()).map_err(|_| Failure::new("a thread has ended"))?;
            all.push(told.recv().map_err(|_| Failure::new("a thread has ended"))??);
        }
        Ok(all)
    };
    keep(context, "keyrings of users, a process and threads", look, || {
        // What root has in its own keyring only its possessor reads.
        add(USER, c"of the process", b"changed", OF_PROCESS)?;
        Ok(())
    })
}
