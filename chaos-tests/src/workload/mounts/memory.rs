//! File systems in memory, with all that is in them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::Duration;

use ckpt_engine::sys::xattr;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::table::{Ground, new};
use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};

/// A tree with a bit of everything.
fn fill(top: &Path) -> Result<(), Failure> {
    fs::create_dir_all(top.join("a/b/c"))?;
    fs::write(top.join("a/b/c/file"), "contents")?;
    fs::hard_link(top.join("a/b/c/file"), top.join("a/other-name"))?;
    symlink("a/b/c/file", top.join("link"))?;
    mkfifo(&top.join("fifo"), Mode::from_bits_truncate(0o640))?;
    let sparse = File::create(top.join("sparse"))?;
    sparse.write_all_at(b"end", 5 << 20)?;
    fs::set_permissions(top.join("a/b"), fs::Permissions::from_mode(0o1710))?;
    chown(top.join("a/b/c"), Some(7), Some(8))?;
    let file = File::open(top.join("a/b/c/file"))?;
    // ramfs has none.
    match xattr::set(file.as_fd(), c"user.note", b"kept") {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        done => Ok(done?),
    }
}

/// All that can be told of a tree.
fn look(path: &Path, found: &mut Vec<String>) -> Result<(), Failure> {
    let status = fs::symlink_metadata(path)?;
    let kind = status.mode();
    let mut line = format!(
        "{} {kind:o} {}:{} {} {} {}.{}",
        path.display(),
        status.uid(),
        status.gid(),
        status.nlink(),
        status.rdev(),
        status.mtime(),
        status.mtime_nsec()
    );
    if status.is_symlink() {
        line = format!("{line} {}", fs::read_link(path)?.display());
    } else if status.is_file() {
        let contents = blake3::hash(&fs::read(path)?);
        let note = xattr::get(File::open(path)?.as_fd(), c"user.note").unwrap_or_default();
        line = format!("{line} {contents} {note:?}");
    }
    found.push(line);
    if status.is_dir() {
        let mut names: Vec<_> = fs::read_dir(path)?
            .map(|entry| Ok::<_, std::io::Error>(entry?.path()))
            .collect::<Result<_, _>>()?;
        names.sort();
        for name in names {
            look(&name, found)?;
        }
    }
    Ok(())
}

fn whole(top: &Path) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    look(top, &mut found)?;
    Ok(found)
}

/// The tree and the mounts stay as they are.
fn stays(context: &mut Context, ground: &Ground, top: &Path) -> Result<(), Failure> {
    let damage = || Ok(fs::set_permissions(top.join("a/b"), fs::Permissions::from_mode(0o700))?);
    keep(context, "files and mounts", || Ok((whole(top)?, ground.told()?)), damage)?;
    let (one, two) = (top.join("a/b/c/file"), top.join("a/other-name"));
    same("the two names", fs::metadata(one)?.ino(), fs::metadata(two)?.ino())
}

pub(super) fn tree(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.memory("memory", "mode=755,size=8m")?;
    fill(&top)?;
    stays(context, &ground, &top)?;
    let blocks = fs::metadata(top.join("sparse"))?.blocks();
    ensure(blocks < 100, || format!("a file of holes has {blocks} blocks"))
}

pub(super) fn ramfs(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.directory("ram")?;
    new(&top, "ramfs", "mode=750")?;
    fill(&top)?;
    stays(context, &ground, &top)
}

pub(super) fn size(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.memory("memory", "mode=700,size=256k,nr_inodes=20")?;
    let full = File::create(top.join("full"))?;
    let mut length = 0;
    while full.write_all_at(&[7; 4096], length).is_ok() {
        length += 4096;
    }
    let told = ground.told()?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            let (remount, none) = (MsFlags::MS_REMOUNT, None::<&str>);
            mount(none, &top, none, remount, Some("size=1m"))?;
        }
        let refused = full.write_all_at(&[7; 4096], length).err().and_then(|it| it.raw_os_error());
        same("a write to the full file system", refused, Some(libc::ENOSPC))?;
        same("what is in it", fs::read(top.join("full"))?.len() as u64 / 4096, length / 4096)?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}

const FILES: u64 = 40;

/// What file `index` holds after `turn` turns: each turn changes one file.
fn contents(index: u64, turn: u64) -> Vec<u8> {
    let last = (turn + FILES - 1 - index) / FILES;
    let length = 1 + mix(last * FILES + index) as usize % 20_000;
    vec![mix(last + index) as u8; length]
}

pub(super) fn changes(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.memory("memory", "mode=755")?;
    let path = |index: u64| top.join(format!("file-{index}"));
    for index in 0..FILES {
        fs::write(path(index), contents(index, 0))?;
    }
    let mut turn = 0;
    while context.step(Duration::from_millis(2))? {
        let index = turn % FILES;
        turn += 1;
        // Half of them are written in place, half are replaced.
        match index % 2 {
            0 => fs::write(path(index), contents(index, turn))?,
            _ => {
                fs::write(top.join("next"), contents(index, turn))?;
                fs::rename(top.join("next"), path(index))?;
            }
        }
        let other = mix(turn) % FILES;
        if context.progress.plant() {
            fs::write(path(other), "damage")?;
        }
        let found = fs::read(path(other))?;
        ensure(found == contents(other, turn), || format!("file {other} is wrong at turn {turn}"))?;
    }
    Ok(())
}

pub(super) fn owner(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.memory("memory", "mode=2751,uid=12,gid=34")?;
    let look = || {
        let status = fs::metadata(&top)?;
        Ok((status.uid(), status.gid(), status.mode() & 0o7777, ground.told()?))
    };
    same("at first", fs::metadata(&top)?.mode() & 0o7777, 0o2751)?;
    keep(context, "owner and permissions", look, || Ok(chown(&top, Some(13), None)?))
}

pub(super) fn read_only(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let top = ground.memory("memory", "mode=755")?;
    fs::write(top.join("secret"), "credentials")?;
    let (none, how) = (None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    mount(none, &top, none, how, none)?;
    let told = ground.told()?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            mount(none, &top, none, MsFlags::MS_REMOUNT, none)?;
        }
        same("what it holds", fs::read_to_string(top.join("secret"))?, "credentials".to_owned())?;
        let refused = fs::write(top.join("secret"), "x").err().and_then(|it| it.raw_os_error());
        same("a write", refused, Some(libc::EROFS))?;
        same("mounts", ground.told()?, told.clone())?;
    }
    Ok(())
}
