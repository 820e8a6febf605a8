//! Mounts that pass new mounts on. Whether they still do is tried at the end.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount, umount};

use super::table::{Ground, bind, new, set};
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};

/// Keeps the table as it is; the damage takes one place out of its group.
fn stays(context: &mut Context, ground: &Ground, place: &Path) -> Result<(), Failure> {
    keep(context, "mounts", || ground.told(), || set(place, MsFlags::MS_PRIVATE))
}

/// Mounts something in one place and tells in how many of the others it came up.
fn reached(ground: &Ground, place: &Path, others: &[&Path]) -> Result<Vec<bool>, Failure> {
    let inside = place.join("new");
    new(&inside, "tmpfs", "")?;
    let told = ground.told()?;
    let has = |other: &&Path| {
        let start = format!("{} ", other.join("new").display());
        told.iter().any(|line| line.starts_with(&start))
    };
    let reached = others.iter().map(has).collect();
    umount(&inside)?;
    Ok(reached)
}

/// Two places that show one directory.
fn two(ground: &Ground, how: MsFlags) -> Result<[std::path::PathBuf; 2], Failure> {
    let (one, two) = (ground.memory("one", "mode=755")?, ground.directory("two")?);
    std::fs::create_dir(one.join("new"))?;
    set(&one, how)?;
    bind(&one, &two)?;
    Ok([one, two])
}

pub(super) fn private(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let [one, two] = two(&ground, MsFlags::MS_PRIVATE)?;
    keep(context, "mounts", || ground.told(), || set(&two, MsFlags::MS_SHARED))?;
    same("reached", reached(&ground, &one, &[&two])?, vec![false])
}

pub(super) fn shared(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let [one, two] = two(&ground, MsFlags::MS_SHARED)?;
    stays(context, &ground, &two)?;
    same("reached from one", reached(&ground, &one, &[&two])?, vec![true])?;
    same("reached from two", reached(&ground, &two, &[&one])?, vec![true])
}

pub(super) fn slave(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let [one, two] = two(&ground, MsFlags::MS_SHARED)?;
    set(&two, MsFlags::MS_SLAVE)?;
    stays(context, &ground, &two)?;
    same("reached from the master", reached(&ground, &one, &[&two])?, vec![true])?;
    same("reached from the slave", reached(&ground, &two, &[&one])?, vec![false])
}

pub(super) fn chain(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let [one, two] = two(&ground, MsFlags::MS_SHARED)?;
    set(&two, MsFlags::MS_SLAVE)?;
    set(&two, MsFlags::MS_SHARED)?;
    let (three, four) = (ground.directory("three")?, ground.directory("four")?);
    bind(&two, &three)?;
    bind(&two, &four)?;
    set(&four, MsFlags::MS_SLAVE)?;
    stays(context, &ground, &four)?;
    same("from the top", reached(&ground, &one, &[&two, &three, &four])?, vec![true; 3])?;
    let middle = reached(&ground, &three, &[&one, &two, &four])?;
    same("from the middle", middle, vec![false, true, true])?;
    same("from the end", reached(&ground, &four, &[&one, &two, &three])?, vec![false; 3])
}

pub(super) fn unbindable(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (one, two) = (ground.memory("one", "mode=755")?, ground.directory("two")?);
    set(&one, MsFlags::MS_UNBINDABLE)?;
    stays(context, &ground, &one)?;
    let bound = mount(Some(&one), &two, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    same("a bind of it", bound, Err(Errno::EINVAL))
}
