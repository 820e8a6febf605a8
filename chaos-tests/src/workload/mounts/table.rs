//! The mounts in a folder, as the kernel tells them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::workload::context::Context;
use crate::workload::outcome::Failure;

/// Whether this is no VE, but a machine that others use.
pub(in crate::workload) fn is_machine_of_others() -> Result<bool, Failure> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    Ok(map.split_whitespace().nth(2) == Some("4294967295"))
}

/// A folder to mount in. Dropping it unmounts all that is in it.
#[derive(Debug)]
pub(in crate::workload) struct Ground {
    folder: PathBuf,
}

impl Ground {
    /// The workload's own folder. What is mounted there is passed on to nobody, and on a machine
    /// that others use nobody sees it.
    pub(in crate::workload) fn new(context: &Context) -> Result<Self, Failure> {
        if is_machine_of_others()? {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, all, None::<&str>)?;
        }
        let folder = context.path("ground");
        fs::create_dir_all(&folder)?;
        let ground = Self { folder: fs::canonicalize(folder)? };
        bind(&ground.folder, &ground.folder)?;
        set(&ground.folder, MsFlags::MS_PRIVATE)?;
        Ok(ground)
    }

    /// A directory in it, made if need be.
    pub(in crate::workload) fn directory(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.folder.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// An empty file in it.
    pub(in crate::workload) fn file(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.folder.join(name);
        fs::File::create(&path)?;
        Ok(path)
    }

    /// A new tmpfs in it.
    pub(in crate::workload) fn memory(
        &self,
        name: &str,
        options: &str,
    ) -> Result<PathBuf, Failure> {
        let path = self.directory(name)?;
        new(&path, "tmpfs", options)?;
        Ok(path)
    }

    /// All mounts in it, in words that do not depend on when and where they were made.
    pub(in crate::workload) fn told(&self) -> Result<Vec<String>, Failure> {
        let mut groups = HashMap::new();
        let mut told = Vec::new();
        let text = whole_table()?;
        let mut lines: Vec<(Vec<&str>, &str)> = text
            .lines()
            .filter_map(|line| {
                let (front, back) = line.split_once(" - ")?;
                Some((front.split(' ').collect::<Vec<&str>>(), back))
            })
            .filter(|(front, _)| Path::new(front[4]).starts_with(&self.folder))
            .collect();
        lines.sort_by_key(|(front, _)| (front[4], front[3]));
        for (front, back) in lines {
            let root = if back.starts_with("overlay") { "" } else { front[3] };
            let mut line = format!("{} {root} {}", front[4], front[5]);
            for word in &front[6..] {
                let (kind, group) = word.split_once(':').unwrap_or((word, "0"));
                let next = groups.len();
                let number = *groups.entry(group).or_insert(next);
                line = format!("{line} {kind}:{number}");
            }
            // What an overlay is made of is the host's business.
            let back = if back.starts_with("overlay") { "overlay" } else { back };
            told.push(format!("{line} {back}"));
        }
        Ok(told)
    }
}

/// The whole mount table, which comes in several pieces: read again until they fit together.
fn whole_table() -> Result<String, Failure> {
    let mut text = fs::read_to_string("/proc/self/mountinfo")?;
    loop {
        let again = fs::read_to_string("/proc/self/mountinfo")?;
        if again == text {
            return Ok(text);
        }
        text = again;
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Whatever cannot be unmounted now goes with the machine.
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
    }
}

/// Mounts a new file system.
pub(in crate::workload) fn new(point: &Path, kind: &str, options: &str) -> Result<(), Failure> {
    Ok(mount(Some("selfcheck"), point, Some(kind), MsFlags::empty(), Some(options))?)
}

/// Mounts what is at `from` at `to` as well.
pub(in crate::workload) fn bind(from: &Path, to: &Path) -> Result<(), Failure> {
    Ok(mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Changes how a mount and its copies learn of new mounts.
pub(in crate::workload) fn set(point: &Path, how: MsFlags) -> Result<(), Failure> {
    Ok(mount(None::<&str>, point, None::<&str>, how, None::<&str>)?)
}

/// Changes the flags of a mount.
pub(in crate::workload) fn flags(point: &Path, flags: MsFlags) -> Result<(), Failure> {
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    Ok(mount(None::<&str>, point, None::<&str>, flags, None::<&str>)?)
}
