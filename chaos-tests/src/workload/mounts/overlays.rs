//! Overlays: directories that are merged of others.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::descriptor;
use ckpt_engine::sys::program::map::{Backing, Map};
use ckpt_engine::sys::program::watch::Watches;
use libc::{IN_CREATE, IN_DELETE, IN_MODIFY};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};

use super::table::{Ground, bind, new, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const PAUSE: Duration = Duration::from_millis(10);
const WORDS: usize = 512;

/// The overlays in a folder, with all that the kernel tells of what they are made of.
fn overlays(ground: &Path) -> Result<Vec<String>, Failure> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found = Vec::new();
    for line in table.lines() {
        let Some((front, back)) = line.split_once(" - overlay selfcheck ") else { continue };
        let words: Vec<&str> = front.split(' ').collect();
        if Path::new(words[4]).starts_with(ground) {
            found.push(format!("{} {} {back}", words[4], words[3]));
        }
    }
    found.sort();
    Ok(found)
}

/// A place that is an overlay of a directory, with its changes in memory.
struct Writable {
    ground: Ground,
    folder: PathBuf,
    lower: PathBuf,
    place: PathBuf,
    told: Vec<String>,
}

impl Writable {
    /// `fill` makes what is below. The overlay stands over that, or beside it.
    fn new(
        context: &Context,
        place: Option<&str>,
        more: &str,
        fill: impl FnOnce(&Path) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let ground = Ground::new(context)?;
        let lower = ground.directory("lower")?;
        let folder = lower.parent().map(Path::to_path_buf).unwrap_or_default();
        fill(&lower)?;
        let memory = ground.memory("memory", "mode=755")?;
        let (upper, work) = (memory.join("upper"), memory.join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let place = place.map_or_else(|| Ok(lower.clone()), |name| ground.directory(name))?;
        let [low, up, work] = [&lower, &upper, &work].map(|path| path.display().to_string());
        let options = format!("lowerdir={low},upperdir={up},workdir={work},userxattr{more}");
        new(&place, "overlay", &options)?;
        let told = overlays(&folder)?;
        same("overlays", told.len(), 1)?;
        Ok(Self { ground, folder, lower, place, told })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    fn open(&self, name: &str) -> Result<File, Failure> {
        let how = File::options().read(true).write(true).create(true).truncate(false).to_owned();
        Ok(how.open(self.path(name))?)
    }

    fn is_told(&self) -> Result<(), Failure> {
        same("overlays", overlays(&self.folder)?, self.told.clone())
    }
}

fn text(path: impl AsRef<Path>) -> Result<String, Failure> {
    Ok(fs::read_to_string(path)?)
}

fn names(path: &Path) -> Result<BTreeSet<String>, Failure> {
    let name = |entry: std::io::Result<fs::DirEntry>| {
        Ok::<_, Failure>(entry?.file_name().to_string_lossy().into_owned())
    };
    fs::read_dir(path)?.map(name).collect()
}

/// A directory that is listed some entries at a time.
struct Listing {
    directory: File,
    all: BTreeSet<String>,
    seen: BTreeSet<String>,
}

impl Listing {
    fn open(path: &Path) -> Result<Self, Failure> {
        let all = names(path)?;
        Ok(Self { directory: File::open(path)?, all, seen: BTreeSet::new() })
    }

    fn go_on(&mut self) -> Result<(), Failure> {
        let entries = descriptor::some_entries(self.directory.as_fd(), 160)?;
        for (name, _) in entries.iter().filter(|(name, _)| name != "." && name != "..") {
            ensure(self.seen.insert(name.clone()), || format!("{name} was listed twice"))?;
        }
        if entries.is_empty() {
            same("what was listed", std::mem::take(&mut self.seen), self.all.clone())?;
            self.directory.rewind()?;
        }
        Ok(())
    }
}

/// Three layers, none of which is ever written, on two file systems.
pub(super) fn lower(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (high, low) = (ground.directory("high")?, ground.directory("low")?);
    let folder = high.parent().map(Path::to_path_buf).unwrap_or_default();
    let middle = ground.memory("middle", "mode=755")?;
    fs::write(high.join("both"), "high")?;
    fs::write(low.join("both"), "low")?;
    fs::write(middle.join("middle"), "middle")?;
    fs::write(low.join("gone"), "never seen")?;
    mknod(&middle.join("gone"), SFlag::S_IFCHR, Mode::empty(), 0)?;
    let bytes: Vec<u8> = (0..4 * WORDS as u64).flat_map(u64::to_le_bytes).collect();
    fs::write(low.join("words"), &bytes)?;
    for (number, layer) in [&high, &middle, &low].into_iter().cycle().take(90).enumerate() {
        fs::create_dir_all(layer.join("list"))?;
        fs::write(layer.join(format!("list/entry-{number:02}")), "x")?;
    }
    let place = ground.directory("place")?;
    let layers = [&high, &middle, &low].map(|layer| layer.display().to_string());
    new(&place, "overlay", &format!("lowerdir={}", layers.join(":")))?;
    let told = overlays(&folder)?;
    same("overlays", told.len(), 1)?;
    let mut file = File::open(place.join("words"))?;
    let private = Map::new(4, Backing::FilePrivate(file.as_fd()))?;
    let mut listing = Listing::open(&place.join("list"))?;
    same("entries", listing.all.len(), 90)?;
    let mut word = 0u64;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(high.join("both"), "damage")?;
        }
        same("the highest", text(place.join("both"))?, "high".to_owned())?;
        same("the middle", text(place.join("middle"))?, "middle".to_owned())?;
        ensure(!place.join("gone").exists(), || "a whiteout hides nothing".to_owned())?;
        let refused = fs::write(place.join("new"), "x").err().and_then(|it| it.raw_os_error());
        same("a write", refused, Some(libc::EROFS))?;
        let mut next = [0; 8];
        file.read_exact(&mut next)?;
        same("the next word of a file", u64::from_le_bytes(next), word)?;
        word += 1;
        if word == 4 * WORDS as u64 {
            word = 0;
            file.rewind()?;
        }
        let own = private.word(WORDS + 3).fetch_add(1, SeqCst);
        same("a changed word of a map", own, private.word(WORDS + 4).fetch_add(1, SeqCst) - 1)?;
        let index = 2 * WORDS + (word as usize) % WORDS;
        same("a word of a map", private.word(index).load(SeqCst), index as u64)?;
        let number = |file: &File| Ok::<_, Failure>(file.metadata()?.ino());
        same("inode", number(&file)?, fs::metadata(place.join("words"))?.ino())?;
        listing.go_on()?;
        same("overlays", overlays(&folder)?, told.clone())?;
    }
    Ok(())
}

/// More layers than one option of fsconfig(2) can name.
pub(super) fn many(context: &mut Context) -> Result<(), Failure> {
    const LAYERS: usize = 24;
    let ground = Ground::new(context)?;
    let memory = ground.memory("memory", "mode=755")?;
    let folder = memory.parent().map(Path::to_path_buf).unwrap_or_default();
    let mut layers = Vec::new();
    for number in 0..LAYERS {
        let layer = match number % 2 {
            0 => ground.directory(&format!("layer-{number}"))?,
            _ => memory.join(format!("layer-{number}")),
        };
        fs::create_dir_all(&layer)?;
        fs::write(layer.join(number.to_string()), number.to_string())?;
        fs::write(layer.join("all"), number.to_string())?;
        layers.push(layer.display().to_string());
    }
    let place = ground.directory("place, with a comma")?;
    new(&place, "overlay", &format!("lowerdir={}", layers.join(":")))?;
    let told = overlays(&folder)?;
    same("overlays", told.len(), 1)?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(folder.join("layer-0/all"), "damage")?;
        }
        same("the highest", text(place.join("all"))?, "0".to_owned())?;
        for number in 0..LAYERS {
            let name = number.to_string();
            same("one of many", text(place.join(&name))?, name)?;
        }
        same("overlays", overlays(&folder)?, told.clone())?;
    }
    Ok(())
}

/// How many files are there to be copied up, one after the other.
const UNTOUCHED: u64 = 300;

fn fill(lower: &Path) -> Result<(), Failure> {
    fs::write(lower.join("copied"), [7; 5000])?;
    fs::write(lower.join("gone"), "gone")?;
    fs::create_dir_all(lower.join("replaced/inner"))?;
    fs::create_dir_all(lower.join("merged"))?;
    fs::create_dir_all(lower.join("fixed"))?;
    fs::write(lower.join("replaced/old"), "old")?;
    fs::write(lower.join("merged/old"), "old")?;
    fs::create_dir(lower.join("untouched"))?;
    for number in 0..UNTOUCHED {
        fs::write(lower.join(format!("untouched/{number}")), number.to_string())?;
    }
    Ok(())
}

/// What was changed stays as it was changed.
fn changed(writable: &Writable) -> Result<(), Failure> {
    ensure(!writable.path("gone").exists(), || "a removed file is back".to_owned())?;
    let all = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    same("a replaced directory", names(&writable.path("replaced"))?, all(&["new"]))?;
    same("a merged directory", names(&writable.path("merged"))?, all(&["new", "old"]))?;
    let moved = fs::rename(writable.path("fixed"), writable.path("elsewhere"));
    let refused = moved.err().and_then(|it| it.raw_os_error());
    same("a move of a directory from below", refused, Some(libc::EXDEV))
}

fn change(writable: &Writable) -> Result<(), Failure> {
    fs::remove_file(writable.path("gone"))?;
    fs::remove_dir_all(writable.path("replaced"))?;
    fs::create_dir(writable.path("replaced"))?;
    fs::write(writable.path("replaced/new"), "new")?;
    fs::write(writable.path("merged/new"), "new")?;
    fs::create_dir(writable.path("dir-0"))?;
    fs::write(writable.path("dir-0/file"), "inside")?;
    changed(writable)
}

fn same_inode(file: &File, path: &Path) -> Result<(), Failure> {
    let (held, named) = (file.metadata()?, fs::metadata(path)?);
    same("the file of a name", (held.dev(), held.ino()), (named.dev(), named.ino()))
}

/// Changes of all kinds, in files that stay open.
fn write(context: &mut Context, writable: &Writable) -> Result<(), Failure> {
    change(writable)?;
    let (mut log, copied) = (writable.open("log")?, writable.open("copied")?);
    let gone = writable.open("temporary")?;
    fs::remove_file(writable.path("temporary"))?;
    gone.set_len(4096)?;
    let pages = writable.open("pages")?;
    pages.set_len(8192)?;
    let shared = Map::new(2, Backing::FileShared(pages.as_fd()))?;
    let lost = Map::new(1, Backing::FileShared(gone.as_fd()))?;
    let mut turn = 0u64;
    while context.step(PAUSE)? {
        writeln!(log, "{turn}")?;
        turn += 1;
        if context.progress.plant() {
            fs::write(writable.path("replaced/more"), "damage")?;
        }
        same("lines of a log", text(writable.path("log"))?.lines().count() as u64, turn)?;
        same_inode(&log, &writable.path("log"))?;
        copied.write_all_at(&turn.to_le_bytes(), 4990)?;
        let found = fs::read(writable.path("copied"))?;
        same("a file that was copied up", &found[4990..4998], turn.to_le_bytes().as_slice())?;
        same("the rest of it", (found[0], found.len()), (7, 5000))?;
        same_inode(&copied, &writable.path("copied"))?;
        let mut bytes = [0; 8];
        gone.read_exact_at(&mut bytes, 8)?;
        same("a file without a name", u64::from_le_bytes(bytes), turn - 1)?;
        same("its map", lost.word(1).load(SeqCst), turn - 1)?;
        lost.word(1).store(turn, SeqCst);
        shared.word(WORDS + 1).store(turn, SeqCst);
        pages.read_exact_at(&mut bytes, (WORDS as u64 + 1) * 8)?;
        same("a file that is mapped", u64::from_le_bytes(bytes), turn)?;
        // A directory of the upper layer can be renamed.
        let (from, to) = (format!("dir-{}", turn - 1), format!("dir-{turn}"));
        fs::rename(writable.path(&from), writable.path(&to))?;
        same("a renamed directory", text(writable.path(&to).join("file"))?, "inside".to_owned())?;
        copy_up(writable, turn)?;
        changed(writable)?;
        writable.is_told()?;
    }
    Ok(())
}

/// Writes to one more file that only the lower layer has.
fn copy_up(writable: &Writable, turn: u64) -> Result<(), Failure> {
    let Some(number) = (turn / 3).checked_sub(1).filter(|&number| number < UNTOUCHED) else {
        return Ok(());
    };
    let path = writable.path(&format!("untouched/{number}"));
    if turn.is_multiple_of(3) {
        same("a file from below", text(&path)?, number.to_string())?;
        File::options().append(true).open(&path)?.write_all(b"+")?;
    }
    same("a file that was copied up", text(&path)?, format!("{number}+"))?;
    let below = text(writable.lower.join(format!("untouched/{number}")))?;
    let hidden = writable.lower == writable.place;
    same("what is below", below, if hidden { format!("{number}+") } else { number.to_string() })
}

pub(super) fn upper(context: &mut Context) -> Result<(), Failure> {
    let writable = Writable::new(context, Some("place"), "", fill)?;
    write(context, &writable)
}

/// The overlay hides what it is made of, and a part of it is seen elsewhere.
pub(super) fn over_itself(context: &mut Context) -> Result<(), Failure> {
    let mut writable = Writable::new(context, None, "", fill)?;
    let part = writable.ground.directory("part")?;
    bind(&writable.path("merged"), &part)?;
    writable.told = overlays(&writable.folder)?;
    same("overlays", writable.told.len(), 2)?;
    let (mut told, view) = (writable.ground.told()?, writable.path("merged/view"));
    told.sort();
    write_until(context, &writable, |turn| {
        fs::write(&view, turn.to_string())?;
        same("a part of it", text(part.join("view"))?, turn.to_string())?;
        fs::remove_file(part.join("view"))?;
        let mut now = writable.ground.told()?;
        now.sort();
        same("mounts", now, told.clone())
    })
}

fn write_until(
    context: &mut Context,
    writable: &Writable,
    mut also: impl FnMut(u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    change(writable)?;
    let file = writable.open("copied")?;
    let mut turn = 0u64;
    while context.step(PAUSE)? {
        turn += 1;
        if context.progress.plant() {
            fs::write(writable.path("merged/more"), "damage")?;
        }
        file.write_all_at(&turn.to_le_bytes(), 100)?;
        let found = fs::read(writable.path("copied"))?;
        same("an open file", &found[100..108], turn.to_le_bytes().as_slice())?;
        copy_up(writable, turn)?;
        changed(writable)?;
        writable.is_told()?;
        also(turn)?;
    }
    Ok(())
}

/// What programs hold of files in an overlay: watches, locks, the name of a socket.
pub(super) fn objects(context: &mut Context) -> Result<(), Failure> {
    let writable = Writable::new(context, Some("place"), ",volatile,xino=off", fill)?;
    change(&writable)?;
    let listener = UnixListener::bind(writable.path("socket"))?;
    let locked = Flock::lock(writable.open("copied")?, FlockArg::LockExclusive);
    let locked = locked.map_err(|(_, errno)| errno)?;
    let again = writable.open("copied")?;
    let watches = Watches::new()?;
    let of_folder = watches.add(&writable.path("merged"), IN_CREATE | IN_DELETE)?;
    let of_file = watches.add(&writable.path("merged/new"), IN_MODIFY)?;
    let of_lower = watches.add(&writable.path("untouched"), IN_CREATE)?;
    let mut opened = File::options().append(true).open(writable.path("merged/new"))?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            watches.remove(of_file)?;
        }
        let mut client = UnixStream::connect(writable.path("socket"))?;
        client.write_all(b"hello")?;
        let mut heard = [0; 5];
        listener.accept()?.0.read_exact(&mut heard)?;
        same("what a client says", heard, *b"hello")?;
        let other = again.try_clone()?;
        let refused = Flock::lock(other, FlockArg::LockSharedNonblock).err().map(|(_, why)| why);
        same("a second lock", refused, Some(Errno::EWOULDBLOCK))?;
        opened.write_all(b"+")?;
        File::create(writable.path("merged/more"))?;
        fs::remove_file(writable.path("merged/more"))?;
        let told = |mask| (of_folder, mask, "more".to_owned());
        let expected = vec![(of_file, IN_MODIFY, String::new()), told(IN_CREATE), told(IN_DELETE)];
        same("events", watches.read()?, expected)?;
        let one = writable.path("untouched/one");
        File::create(&one)?;
        fs::remove_file(&one)?;
        let created = (of_lower, IN_CREATE, "one".to_owned());
        same("events of a directory from below", watches.read()?, vec![created])?;
        changed(&writable)?;
        writable.is_told()?;
    }
    drop(locked);
    Ok(())
}

/// An overlay of another one, and of a directory that a mount hides since.
pub(super) fn stacked(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let memory = ground.memory("memory", "mode=755")?;
    let folder = memory.parent().map(Path::to_path_buf).unwrap_or_default();
    for name in ["low", "upper", "work", "other"] {
        fs::create_dir(memory.join(name))?;
    }
    fs::write(memory.join("low/first"), "first")?;
    fs::write(memory.join("other/second"), "second")?;
    let (one, two) = (ground.directory("z/one")?, ground.directory("two")?);
    let within = memory.display();
    let own = format!("upperdir={within}/upper,workdir={within}/work,userxattr");
    new(&one, "overlay", &format!("lowerdir={within}/low,{own}"))?;
    fs::write(one.join("third"), "third")?;
    new(&two, "overlay", &format!("lowerdir={}:{within}/other", one.display()))?;
    new(&memory.join("other"), "tmpfs", "mode=700")?;
    let told = overlays(&folder)?;
    same("overlays", told.len(), 2)?;
    let mut file = File::open(two.join("second"))?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(memory.join("other/new"), "damage")?;
        }
        for name in ["first", "second", "third"] {
            same("a file of an overlay of an overlay", text(two.join(name))?, name.to_owned())?;
        }
        let mut read = String::new();
        file.rewind()?;
        file.read_to_string(&mut read)?;
        same("an open file", read, "second".to_owned())?;
        same("what hides a layer", names(&memory.join("other"))?.len(), 0)?;
        same("overlays", overlays(&folder)?, told.clone())?;
    }
    Ok(())
}

/// Ends with the workload, however that ends.
struct Shell(std::process::Child);

impl Drop for Shell {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Programs and libraries of an overlay over `/usr`, as systemd-sysext makes it: a shell that starts
/// one program after the other.
pub(super) fn programs(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let added = ground.memory("added", "mode=755")?;
    let folder = added.parent().map(Path::to_path_buf).unwrap_or_default();
    fs::create_dir(added.join("bin"))?;
    fs::copy("/usr/bin/sleep", added.join("bin/selfcheck-sleep"))?;
    let ticks = folder.join("ticks");
    let child = Child::start(context, "extended", |stop| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        set(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
        let usr = Path::new("/usr");
        new(usr, "overlay", &format!("lowerdir={}:/usr", added.display()))?;
        let script = "while :; do selfcheck-sleep 0.02; echo tick >> \"$0\"; done";
        let mut shell = Command::new("/usr/bin/dash");
        let mut shell = Shell(shell.args(["-c", script]).arg(&ticks).spawn()?);
        let mut before = 0;
        let mut waited = 0;
        while !stop.wait(PAUSE)? {
            ensure(shell.0.try_wait()?.is_none(), || "a program has ended".to_owned())?;
            let exe = fs::read_link(format!("/proc/{}/exe", shell.0.id()))?;
            same("its program", exe, PathBuf::from("/usr/bin/dash"))?;
            let written = fs::read(&ticks).unwrap_or_default();
            let is_whole = written.chunks(5).all(|line| line == b"tick\n");
            ensure(is_whole, || "something else was written".to_owned())?;
            let now = written.len();
            ensure(now >= before, || "what it has written has gone".to_owned())?;
            waited = if now == before { waited + 1 } else { 0 };
            ensure(waited < 500, || "a program starts no others any more".to_owned())?;
            before = now;
        }
        Ok(())
    })?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(&ticks, "damage")?;
        }
        child.check()?;
        let elsewhere = Path::new("/usr/bin/selfcheck-sleep").exists();
        ensure(!elsewhere, || "others see the overlay".to_owned())?;
    }
    child.finish()
}

/// A service whose directories nobody else sees merged.
pub(super) fn private(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let folder = place.parent().map(Path::to_path_buf).unwrap_or_default();
    fs::write(place.join("below"), "below")?;
    let memory = ground.directory("memory")?;
    let child = Child::start(context, "service", |stop| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        set(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
        new(&memory, "tmpfs", "mode=700")?;
        fs::create_dir(memory.join("upper"))?;
        fs::create_dir(memory.join("work"))?;
        let (low, within) = (place.display(), memory.display());
        let own = format!("upperdir={within}/upper,workdir={within}/work");
        new(&place, "overlay", &format!("lowerdir={low},{own},userxattr"))?;
        let told = overlays(&folder)?;
        let file = File::options().create_new(true).write(true).open(place.join("file"))?;
        let mut turn = 0u64;
        while !stop.wait(PAUSE)? {
            turn += 1;
            file.write_all_at(turn.to_string().as_bytes(), 0)?;
            same("what was written", text(place.join("file"))?, turn.to_string())?;
            same_inode(&file, &place.join("file"))?;
            same("what is below", text(place.join("below"))?, "below".to_owned())?;
            same("overlays", overlays(&folder)?, told.clone())?;
        }
        Ok(())
    })?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            let inside = format!("/proc/{}/root{}/below", child.pid, place.display());
            fs::write(inside, "damage")?;
        }
        child.check()?;
        same("what others see", names(&place)?.len(), 1)?;
        same("what others see in memory", names(&memory)?.len(), 0)?;
    }
    child.finish()
}
