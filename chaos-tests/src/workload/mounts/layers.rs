//! Mounts on, in and under other mounts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};

use super::table::{Ground, new};
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};

fn put(top: &Path, text: &str) -> Result<(), Failure> {
    Ok(fs::write(top.join("file"), text)?)
}

fn get(top: &Path) -> Result<String, Failure> {
    Ok(fs::read_to_string(top.join("file"))?)
}

/// Three file systems in one place; at the end they are taken away one by one.
pub(super) fn over(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    for layer in ["lowest", "middle", "highest"] {
        new(&place, "tmpfs", "")?;
        put(&place, layer)?;
    }
    let look = || Ok((get(&place)?, ground.told()?));
    keep(context, "what is on top", look, || put(&place, "damage"))?;
    for layer in ["highest", "middle", "lowest"] {
        same("the next layer", get(&place)?, layer.to_owned())?;
        umount(&place)?;
    }
    Ok(())
}

pub(super) fn nested(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let mut place = ground.directory("0")?;
    let mut places = Vec::new();
    for depth in 1..=6 {
        new(&place, if depth % 2 == 0 { "ramfs" } else { "tmpfs" }, "")?;
        put(&place, &depth.to_string())?;
        places.push(place.clone());
        place = place.join(depth.to_string());
        fs::create_dir(&place)?;
    }
    let look = || {
        let texts: Result<Vec<String>, Failure> = places.iter().map(|place| get(place)).collect();
        Ok((texts?, ground.told()?))
    };
    keep(context, "what is in each", look, || put(&places[3], "damage"))
}

pub(super) fn many(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let mut places = Vec::new();
    for number in 0..40 {
        let place = ground.memory(&format!("place-{number}"), "size=64k")?;
        put(&place, &number.to_string())?;
        places.push(place);
    }
    let told = ground.told()?;
    let mut turn = 0;
    while context.step(Duration::from_millis(10))? {
        let place = &places[turn % places.len()];
        if context.progress.plant() {
            put(place, "damage")?;
        }
        same("what is in it", get(place)?, (turn % places.len()).to_string())?;
        if turn % places.len() == 0 {
            same("mounts", ground.told()?, told.clone())?;
        }
        turn += 1;
    }
    Ok(())
}

pub(super) fn moved(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (from, to) = (ground.memory("from", "")?, ground.directory("to")?);
    put(&from, "outer")?;
    fs::create_dir(from.join("inner"))?;
    new(&from.join("inner"), "tmpfs", "")?;
    put(&from.join("inner"), "inner")?;
    mount(Some(&from), &to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    let look = || Ok((get(&to)?, get(&to.join("inner"))?, ground.told()?));
    keep(context, "what was moved", look, || put(&to.join("inner"), "damage"))
}

/// A mount in a directory that another mount hides afterwards, with everything in it.
pub(super) fn covered(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let outer = ground.directory("outer")?;
    let inner = ground.directory("outer/inner")?;
    new(&inner, "tmpfs", "")?;
    put(&inner, "hidden")?;
    new(&outer, "tmpfs", "")?;
    put(&outer, "seen")?;
    let look = || Ok((get(&outer)?, inner.exists(), ground.told()?));
    keep(context, "what is seen", look, || put(&outer, "damage"))?;
    umount(&outer)?;
    same("what was hidden", get(&inner)?, "hidden".to_owned())
}
