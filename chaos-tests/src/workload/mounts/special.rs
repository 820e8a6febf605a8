//! Other kinds of mounts, odd places, and programs that sit in a mount.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::table::{Ground, new};
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};

pub(super) fn names(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let mut places = Vec::new();
    for name in ["a b", "c\\040d", "e\nf", "tab\there", "#hash", "grüße", "(deleted)"] {
        let place = ground.memory(name, "")?;
        fs::write(place.join("file"), name)?;
        places.push((place, name));
    }
    let look = || {
        let read = |(place, name): &(std::path::PathBuf, &str)| {
            let text = fs::read_to_string(place.join("file"))?;
            same("what is in it", text, (*name).to_owned())
        };
        places.iter().try_for_each(read)?;
        ground.told()
    };
    keep(context, "mounts", look, || Ok(fs::write(places[2].0.join("file"), "damage")?))
}

pub(super) fn proc(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (hidden, small) = (ground.directory("hidden")?, ground.directory("small")?);
    new(&hidden, "proc", "hidepid=invisible,gid=5")?;
    new(&small, "proc", "subset=pid")?;
    let own = std::process::id();
    let look = || {
        let status = fs::read_to_string(hidden.join(format!("{own}/comm")))?;
        same("own pid", fs::read_link(small.join("self"))?, own.to_string().into())?;
        Ok((status, small.join("cpuinfo").exists(), ground.told()?))
    };
    let (none, remount) = (None::<&str>, MsFlags::MS_REMOUNT);
    keep(context, "both", look, || Ok(mount(none, &hidden, none, remount, Some("hidepid=off"))?))
}

pub(super) fn devpts(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("pts")?;
    new(&place, "devpts", "newinstance,ptmxmode=640,mode=604,gid=7")?;
    let look = || {
        let names: Vec<_> = fs::read_dir(&place)?.flatten().map(|it| it.file_name()).collect();
        Ok((names, ground.told()?))
    };
    let (none, remount) = (None::<&str>, MsFlags::MS_REMOUNT);
    let options = Some("ptmxmode=666,mode=604,gid=7");
    keep(context, "terminals", look, || Ok(mount(none, &place, none, remount, options)?))
}

pub(super) fn inside(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.memory("memory", "mode=755")?;
    fs::create_dir(place.join("here"))?;
    std::env::set_current_dir(place.join("here"))?;
    let file = File::options().create_new(true).read(true).write(true).open("open")?;
    let deleted = File::options().create_new(true).read(true).write(true).open("gone")?;
    fs::remove_file("gone")?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        turn += 1;
        for file in [&file, &deleted] {
            file.write_all_at(&turn.to_le_bytes(), 8 * (turn % 100))?;
            if context.progress.plant() {
                file.write_all_at(b"damage!!", 8 * (turn % 100))?;
            }
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, 8 * (turn % 100))?;
            same("what was written", u64::from_le_bytes(bytes), turn)?;
        }
        let seen = fs::read("open")?;
        same("through the name", seen.len() as u64 / 8 > turn % 100, true)?;
        same("working directory", std::env::current_dir()?, place.join("here"))?;
    }
    std::env::set_current_dir("/")?;
    Ok(())
}

pub(super) fn listener(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let path = ground.memory("memory", "mode=755")?.join("socket");
    let listener = UnixListener::bind(&path)?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        turn += 1;
        if context.progress.plant() {
            fs::remove_file(&path)?;
        }
        let mut client = UnixStream::connect(&path)?;
        client.write_all(&turn.to_le_bytes())?;
        let mut bytes = [0; 8];
        listener.accept()?.0.read_exact(&mut bytes)?;
        same("what came", u64::from_le_bytes(bytes), turn)?;
    }
    Ok(())
}
