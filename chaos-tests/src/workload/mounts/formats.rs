//! Programs that run files of other kinds (binfmt_misc), as a VE registers them for itself.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::table::{Ground, is_machine_of_others, new};
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};

/// What is registered: a name, and the rest of the line. Of two that fit the newer one counts.
const ENTRIES: [(&str, &str); 5] = [
    ("objects-old", "E::moved::/bin/false:"),
    ("objects-end", "E::moved::/bin/echo:F"),
    ("objects-off", "E::unmoved::/bin/echo:"),
    ("objects-mask", "M:2:\\x00A:\\xff\\xdf:/bin/echo:P"),
    ("objects-bytes", "M::objects\\x3a::/bin/echo:OC"),
];

/// A file that can be executed.
fn executable(context: &Context, name: &str, bytes: &[u8]) -> Result<PathBuf, Failure> {
    let path = context.path(name);
    fs::write(&path, bytes)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(path)
}

/// What a program said, or the error of starting it.
fn said(path: &Path) -> Result<String, i32> {
    match Command::new(path).output() {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => Err(error.raw_os_error().unwrap_or(0)),
    }
}

/// On a machine that others use, registers nothing there: in a user namespace of its own.
fn apart() -> Result<(), Failure> {
    if !is_machine_of_others()? {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", "0 0 1")?;
    fs::write("/proc/self/gid_map", "0 0 1")?;
    let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(None::<&str>, "/", None::<&str>, all, None::<&str>)?)
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    apart()?;
    let ground = Ground::new(context)?;
    let place = ground.directory("formats")?;
    new(&place, "binfmt_misc", "")?;
    for (name, rest) in ENTRIES {
        let mut register = fs::File::options().write(true).open(place.join("register"))?;
        register.write_all(format!(":{name}:{rest}").as_bytes())?;
    }
    fs::write(place.join("objects-off"), "0")?;
    let files = [
        executable(context, "one.moved", b"anything")?,
        executable(context, "two.unmoved", b"anything")?,
        executable(context, "three", b"??\0a and so on")?,
        executable(context, "four", b"objects: a list")?,
    ];
    let look = || {
        let words: Vec<_> = files.iter().map(|path| said(path)).collect();
        let path = |place: usize| format!("{}\n", files[place].display());
        same("a name that ends so", &words[0], &Ok(path(0)))?;
        // The shell is not asked.
        same("one that is switched off", &words[1], &Err(libc::ENOEXEC))?;
        same("some of the bits", &words[2].as_ref().map(|it| it.ends_with(&path(2))), &Ok(true))?;
        same("some bytes", &words[3], &Ok(path(3)))?;
        let text = |(name, _): &(&str, &str)| fs::read_to_string(place.join(name));
        Ok((ENTRIES.iter().map(text).collect::<Result<Vec<_>, _>>()?, ground.told()?))
    };
    keep(context, "what is registered", look, || Ok(fs::write(place.join("objects-end"), "0")?))?;
    for (name, _) in ENTRIES {
        fs::write(place.join(name), "-1")?;
    }
    Ok(umount2(&place, MntFlags::empty())?)
}
