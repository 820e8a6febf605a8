//! One thing in two places.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::mount::umount;

use super::table::{Ground, bind, new};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

/// What is written by one name is read by the other, in turns.
fn both_ways(
    context: &mut Context,
    ground: &Ground,
    one: &Path,
    two: &Path,
) -> Result<(), Failure> {
    let told = ground.told()?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        turn += 1;
        let (to, from) = if turn.is_multiple_of(2) { (one, two) } else { (two, one) };
        fs::write(to, turn.to_string())?;
        if context.progress.plant() {
            fs::write(from, "something else")?;
        }
        same("what the other name shows", fs::read_to_string(from)?, turn.to_string())?;
        same("inode", fs::metadata(one)?.ino(), fs::metadata(two)?.ino())?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}

pub(super) fn directory(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (one, two) = (ground.directory("one")?, ground.directory("two")?);
    bind(&one, &two)?;
    both_ways(context, &ground, &one.join("file"), &two.join("file"))
}

pub(super) fn file(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (one, two) = (ground.file("one")?, ground.file("two")?);
    bind(&one, &two)?;
    both_ways(context, &ground, &one, &two)
}

pub(super) fn part(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let whole = ground.directory("whole")?;
    // Its limits are those of the file system, however many parts of it are seen.
    new(&whole, "tmpfs", "mode=700,size=256k,nr_inodes=50")?;
    fs::create_dir_all(whole.join("deep/part"))?;
    fs::create_dir(whole.join("other"))?;
    let (one, two) = (ground.directory("one")?, ground.directory("two")?);
    bind(&whole.join("deep"), &one)?;
    bind(&whole.join("deep/part"), &two)?;
    bind(&whole.join("other"), &ground.directory("three")?)?;
    umount(&whole)?;
    both_ways(context, &ground, &one.join("part/file"), &two.join("file"))
}
