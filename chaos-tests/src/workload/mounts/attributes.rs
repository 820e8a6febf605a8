//! Attributes of single mounts.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::MsFlags;

use super::table::{Ground, bind, flags};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

pub(super) fn read_only(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (real, view) = (ground.directory("real")?, ground.directory("view")?);
    bind(&real, &view)?;
    flags(&view, MsFlags::MS_RDONLY)?;
    let told = ground.told()?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        turn += 1;
        fs::write(real.join("file"), turn.to_string())?;
        if context.progress.plant() {
            flags(&view, MsFlags::empty())?;
        }
        same("the view", fs::read_to_string(view.join("file"))?, turn.to_string())?;
        let refused = errno(fs::write(view.join("file"), "x"));
        same("a write to the view", refused, Some(libc::EROFS))?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}

pub(super) fn limited(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let memory = ground.memory("memory", "mode=755")?;
    fs::write(memory.join("program"), "#!/bin/sh\nexit 0\n")?;
    fs::set_permissions(memory.join("program"), fs::Permissions::from_mode(0o755))?;
    fs::write(memory.join("file"), "x")?;
    symlink("file", memory.join("link"))?;
    let no_links = MsFlags::from_bits_retain(256);
    flags(&memory, MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | no_links)?;
    let told = ground.told()?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            flags(&memory, MsFlags::MS_NOSUID)?;
        }
        let run = Command::new(memory.join("program")).spawn();
        same("a program there", errno(run), Some(libc::EACCES))?;
        same("a link there", errno(fs::read(memory.join("link"))), Some(libc::ELOOP))?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}

/// Reads a file that has not been read since it was written, and tells whether that was noted.
fn is_noted(path: &Path) -> Result<bool, Failure> {
    fs::write(path, "x")?;
    let times = |path: &Path| {
        Ok::<_, Failure>((fs::metadata(path)?.atime(), fs::metadata(path)?.atime_nsec()))
    };
    let before = times(path)?;
    // The kernel's clock for files goes in steps.
    std::thread::sleep(Duration::from_millis(12));
    fs::read(path)?;
    Ok(times(path)? != before)
}

pub(super) fn times(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let memory = ground.memory("memory", "mode=755")?;
    let (always, never) = (ground.directory("always")?, ground.directory("never")?);
    bind(&memory, &always)?;
    bind(&memory, &never)?;
    flags(&always, MsFlags::MS_STRICTATIME | MsFlags::MS_NODIRATIME)?;
    flags(&never, MsFlags::MS_NOATIME)?;
    let told = ground.told()?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            flags(&never, MsFlags::MS_STRICTATIME)?;
        }
        ensure(is_noted(&always.join("file"))?, || "an access is not noted".to_owned())?;
        ensure(!is_noted(&never.join("file"))?, || "an access is noted".to_owned())?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}
