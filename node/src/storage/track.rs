//! The source's side: what has changed in a VE's files since the last round.
//!
//! A file is taken as unchanged only if what stat(2) said *before* it was read the last time is
//! what it says now. Three things escape that test, and such files are compared by their
//! contents instead:
//!
//! - stores through a shared mapping leave no trace after the first one: the caller names the
//!   files that are mapped so, and they are also compared once more after they no longer are;
//! - a write(2) marks the file before it changes the contents: a file that changed shortly
//!   before it was read is compared again in the next round, unless nobody had it open for
//!   writing any more;
//! - on tmpfs stores through a mapping never leave a trace: every file there is compared.

use std::{
    collections::HashSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{SystemTime, UNIX_EPOCH},
};

use ckpt_engine::{sys::xattr, writers::Writers};
use ckpt_format::tree::{FileRecord, Step, Timestamp};
use nix::fcntl::OFlag;

use super::{
    attributes::{self, Ids},
    contents::{Change, Failure, Read},
    error::{SinkClosed, TreeError, at, has_gone, show},
    glance::glance,
    mirror::{Directory, Mirror},
    path,
    status::{self, Identity, Recall, Status},
    walk::{Found, Scan, Walk},
};

/// A write(2) is not expected to take longer than this, in seconds.
const WRITE_TIME_MAX_SECONDS: i64 = 15;

/// How coarse the times of files can be, in nanoseconds, with much room.
const TICK_NS: i128 = 100_000_000;

/// A file that is smaller than this is compared once more in less time than its writers are found.
const COMPARED_MAX: u64 = 64 << 10;

/// A tree of a VE that runs here.
#[derive(Debug)]
pub struct SourceTree {
    /// Its number in the records.
    pub number: u32,
    /// Where it is read.
    pub kind: SourceKind,
}

/// Where a tree is read.
#[derive(Debug)]
pub enum SourceKind {
    /// The VE's own files.
    Own {
        /// The upper directory of the overlay, with plain ids.
        upper: OwnedFd,
        /// The overlay, without what is mounted in it.
        view: OwnedFd,
    },
    /// A tmpfs.
    Memory {
        /// All of it, without what is mounted in it.
        top: OwnedFd,
        /// What the host sees for root inside.
        id_base: u32,
    },
}

/// Files that may be changed at any moment through a shared writable mapping, by device and
/// inode number as stat(2) shows them through the VE's own mounts.
pub type MappedFiles = HashSet<(u64, u64)>;

/// What one round has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileRound {
    /// How many records it took.
    pub records: u64,
    /// How much file data was in them, in bytes.
    pub data_bytes: u64,
    /// How much was read and compared for that, in bytes.
    pub compared_bytes: u64,
    /// How many files there are, of all types.
    pub files: u64,
    /// How many could not be read because they changed or vanished meanwhile. They come with
    /// the next round.
    pub postponed: u64,
}

/// Knows what the target has of a VE's files, and tells what it lacks.
#[derive(Debug)]
pub struct FileTracker {
    trees: Vec<Tracked>,
    writers: Option<Writers>,
    write_time_max_seconds: i64,
}

#[derive(Debug)]
struct Tracked {
    tree: SourceTree,
    mirror: Option<Mirror>,
}

type Sink<'a> = &'a mut dyn FnMut(FileRecord) -> Result<(), SinkClosed>;

impl FileTracker {
    /// Starts with a target that has the template and empty tmpfs mounts.
    pub fn new(trees: Vec<SourceTree>) -> Self {
        let trees = trees.into_iter().map(|tree| Tracked { tree, mirror: None });
        let writers = Writers::new().inspect_err(|error| {
            tracing::info!(%error, "files that changed a moment ago are compared again");
        });
        Self {
            trees: trees.collect(),
            writers: writers.ok(),
            write_time_max_seconds: WRITE_TIME_MAX_SECONDS,
        }
    }

    /// Sets how long before it is read a file must have changed last to be trusted in the next
    /// round: as long as a single write(2) may take, in seconds.
    #[must_use]
    pub fn with_write_time_max(self, seconds: i64) -> Self {
        Self { write_time_max_seconds: seconds, ..self }
    }

    /// Tells what has changed since the last round. `mapped` must have been found just before.
    /// In the `last` round the VE must be frozen; what is told then makes the trees equal.
    ///
    /// After an error nothing is known of the target any more.
    pub fn round(
        &mut self,
        mapped: &MappedFiles,
        last: bool,
        sink: Sink<'_>,
    ) -> Result<FileRound, TreeError> {
        let mut result = FileRound::default();
        for Tracked { tree, mirror } in &mut self.trees {
            let trusted_until = seconds_now().saturating_sub(self.write_time_max_seconds);
            let writers = self.writers.as_ref();
            let mut round = Round { tree, mapped, last, trusted_until, writers, result, sink };
            round.run(mirror)?;
            result = round.result;
        }
        Ok(result)
    }
}

fn seconds_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// One round in one tree.
struct Round<'a> {
    tree: &'a SourceTree,
    mapped: &'a MappedFiles,
    last: bool,
    /// What has changed since then may be changing still.
    trusted_until: i64,
    writers: Option<&'a Writers>,
    result: FileRound,
    sink: Sink<'a>,
}

impl Round<'_> {
    fn run(&mut self, mirror: &mut Option<Mirror>) -> Result<(), TreeError> {
        let recall = match (&mirror, self.last) {
            (Some(mirror), true) => mirror.unchanged_since(self.trusted_until).collect(),
            _ => Recall::default(),
        };
        if self.last
            && let Some(mirror) = mirror
        {
            let directories = mirror.directories();
            if let Some(scan) = glance(self.top(), mirror, &directories, &recall) {
                return self.tell(&directories, &HashSet::new(), mirror, &scan);
            }
        }
        let known = |identity: &Identity| mirror.as_ref().is_some_and(|it| it.knows(identity));
        let overlay = self.is_own();
        let walk = Walk { top: self.top(), overlay, steady: self.last, known: &known, recall };
        let scan = walk.run()?;
        let mirror = match mirror {
            Some(mirror) if mirror.top() == scan.top => mirror,
            other => other.insert(Mirror::new(scan.top)),
        };
        let last = self.last;
        let touched = mirror.follow(&scan, last, &mut |step| self.emit(step))?;
        self.tell(&mirror.directories(), &touched, mirror, &scan)
    }

    /// Tells what is in all files, now that the target has their names.
    fn tell(
        &mut self,
        directories: &[Directory],
        touched: &HashSet<Identity>,
        mirror: &mut Mirror,
        scan: &Scan,
    ) -> Result<(), TreeError> {
        self.result.files += scan.nodes.len() as u64;
        for directory in directories {
            self.files(directory, mirror, scan)?;
        }
        // Nothing changes an entry any more, so directories keep the times they get now.
        for directory in directories {
            let touched = touched.contains(&directory.identity) || directory.path.is_empty();
            self.directory(directory, touched, mirror, scan)?;
        }
        Ok(())
    }

    fn top(&self) -> BorrowedFd<'_> {
        match &self.tree.kind {
            SourceKind::Own { upper, .. } => upper.as_fd(),
            SourceKind::Memory { top, .. } => top.as_fd(),
        }
    }

    fn is_own(&self) -> bool {
        matches!(self.tree.kind, SourceKind::Own { .. })
    }

    fn ids(&self) -> Ids {
        match self.tree.kind {
            SourceKind::Own { .. } => Ids { base: 0 },
            SourceKind::Memory { id_base, .. } => Ids { base: id_base },
        }
    }

    fn emit(&mut self, step: Step) -> Result<(), TreeError> {
        self.result.records += 1;
        if let Step::Data { data, .. } = &step {
            self.result.data_bytes += data.len() as u64;
        }
        Ok((self.sink)(FileRecord { tree: self.tree.number, step })?)
    }

    /// Something was not where it was seen. That is no error while the VE runs.
    fn postpone(&mut self, path: &[u8]) -> Result<(), TreeError> {
        if self.last {
            return Err(TreeError::Unsteady { path: show(path) });
        }
        self.result.postponed += 1;
        Ok(())
    }

    fn directory(
        &mut self,
        directory: &Directory,
        touched: bool,
        mirror: &mut Mirror,
        scan: &Scan,
    ) -> Result<(), TreeError> {
        let Directory { identity, path, .. } = directory;
        let (Some(found), Some(sent)) = (scan.nodes.get(identity), mirror.sent(identity)) else {
            return Ok(());
        };
        if sent.stamp == Some(found.status.stamp) && !touched {
            return Ok(());
        }
        sent.stamp = None;
        let place = match path::open_directory(self.top(), path) {
            Err(errno) if has_gone(errno) => return self.postpone(path),
            place => place.map_err(at("open", path))?,
        };
        let Some(status) = self.still(place.as_fd(), identity, path)? else {
            return self.postpone(path);
        };
        let attributes = attributes::read(place.as_fd(), &status, self.ids())
            .map_err(at("read the attributes of", path))?;
        sent.stamp = Some(found.status.stamp);
        let same = sent.attributes.as_ref();
        if touched || same.is_none_or(|sent| attributes::differ(sent, &attributes)) {
            sent.attributes = Some(attributes.clone());
            self.emit(Step::Describe { path: path.clone(), attributes })?;
        }
        Ok(())
    }

    fn files(
        &mut self,
        directory: &Directory,
        mirror: &mut Mirror,
        scan: &Scan,
    ) -> Result<(), TreeError> {
        let mut here = None;
        for (name, identity) in &directory.files {
            let path = path::join(&directory.path, name);
            let Some(found) = scan.nodes.get(identity) else { continue };
            let Some(sent) = mirror.sent(identity) else { continue };
            let regular = identity.kind == libc::S_IFREG;
            let mapped = regular && self.is_mapped(&path, found, &mut sent.seen_as);
            let unchanged = sent.stamp == Some(found.status.stamp);
            let trusted = self.is_own() && !mapped && !sent.doubtful;
            if unchanged && (trusted || !regular) {
                continue;
            }
            sent.stamp = None;
            if here.is_none() {
                here = match path::open_directory(self.top(), &directory.path) {
                    Err(errno) if has_gone(errno) => None,
                    place => Some(place.map_err(at("open", &directory.path))?),
                };
            }
            let Some(place) = &here else {
                self.postpone(&path)?;
                continue;
            };
            let place = match path::open_name(place.as_fd(), name) {
                Err(errno) if has_gone(errno) => {
                    self.postpone(&path)?;
                    continue;
                }
                place => place.map_err(at("open", &path))?,
            };
            let Some(status) = self.still(place.as_fd(), identity, &path)? else {
                self.postpone(&path)?;
                continue;
            };
            let file = Opened { place, status, path, regular };
            let recent = file.status.stamp.changed.seconds >= self.trusted_until;
            let doubtful = mapped || (recent && !self.is_finished(&file));
            self.file(&file, sent)?;
            sent.doubtful = doubtful;
        }
        Ok(())
    }

    /// Sends the contents and attributes of one file, as far as they differ.
    fn file(&mut self, file: &Opened, sent: &mut super::mirror::Sent) -> Result<(), TreeError> {
        let Opened { place, status, path, regular } = file;
        let before = (self.result.records, self.result.data_bytes);
        let read = match regular {
            true => self.contents(file, &mut sent.blocks)?,
            false => Read::Whole,
        };
        let written = before.0 != self.result.records;
        let attributes = attributes::read(place.as_fd(), status, self.ids())
            .map_err(at("read the attributes of", path))?;
        let same = sent.attributes.as_ref();
        if written || same.is_none_or(|sent| attributes::differ(sent, &attributes)) {
            sent.attributes = Some(attributes.clone());
            self.emit(Step::Describe { path: path.clone(), attributes })?;
        }
        match read {
            Read::Whole => sent.stamp = Some(status.stamp),
            Read::Cut => self.postpone(path)?,
        }
        Ok(())
    }

    fn contents(
        &mut self,
        file: &Opened,
        blocks: &mut super::contents::Blocks,
    ) -> Result<Read, TreeError> {
        let path = &file.path;
        let flags = OFlag::O_RDONLY | OFlag::O_NOATIME;
        let opened = path::reopen(file.place.as_fd(), flags).map_err(at("open", path))?;
        if self.is_own() {
            let partial = xattr::get(opened.as_fd(), c"trusted.overlay.metacopy")
                .map_err(at("read the attributes of", path))?;
            if partial.is_some() {
                let what = "kept without its contents, which are in the template";
                return Err(TreeError::Unsupported { path: show(path), what });
            }
        }
        let size = file.status.stamp.size;
        self.result.compared_bytes += size;
        let emit = &mut |change| {
            let path = path.clone();
            self.emit(match change {
                Change::Resize(size) => Step::Resize { path, size },
                Change::Data(offset, data) => Step::Data { path, offset, data: data.into() },
                Change::Hole(offset, length) => Step::Hole { path, offset, length },
            })
        };
        match blocks.update(opened.as_fd(), size, emit) {
            Ok(read) => Ok(read),
            Err(Failure::Emit(error)) => Err(error),
            Err(Failure::Read(source)) => Err(at("read", path)(source)),
        }
    }

    /// What an open file is now, if it still is the one that was meant.
    fn still(
        &self,
        place: BorrowedFd<'_>,
        identity: &Identity,
        path: &[u8],
    ) -> Result<Option<Status>, TreeError> {
        match status::of_open(place) {
            Ok((found, status)) => Ok((found == *identity).then_some(status)),
            Err(errno) if has_gone(errno) => Ok(None),
            Err(errno) => Err(at("look at", path)(errno)),
        }
    }

    /// Whether everything that was begun to be written to a file is in it: nobody has it open for
    /// that any more, and whoever opens it from now on leaves another time in it. A VE that stands
    /// still is not asked: nothing is compared with what is read then.
    fn is_finished(&self, file: &Opened) -> bool {
        if self.last || !file.regular || file.status.stamp.size < COMPARED_MAX {
            return false;
        }
        let changed = file.status.stamp.changed;
        let changed_ns =
            i128::from(changed.seconds) * 1_000_000_000 + i128::from(changed.nanoseconds);
        let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_nanos());
        let old = i128::try_from(now_ns).is_ok_and(|now_ns| changed_ns + TICK_NS < now_ns);
        let written = self.writers.map(|writers| writers.any(file.place.as_fd()));
        old && matches!(written, Some(Ok(false)))
    }

    /// Whether a file can be changed through a mapping. The VE sees other numbers for its files
    /// than the upper directory has; they are asked once, and only if it matters.
    fn is_mapped(&self, path: &[u8], found: &Found, seen_as: &mut Option<(u64, u64)>) -> bool {
        let SourceKind::Own { view, .. } = &self.tree.kind else { return false };
        if self.mapped.is_empty() {
            return false;
        }
        let numbers = match *seen_as {
            Some(numbers) => numbers,
            None => {
                let (parent, name) = path::split(path);
                let seen = path::open_directory(view.as_fd(), parent)
                    .and_then(|place| path::open_name(place.as_fd(), name))
                    .and_then(|place| nix::sys::stat::fstat(&place));
                // Not certainly the same file: it counts as mapped, and is asked again.
                let Ok(seen) = seen else { return true };
                let (numbers, status) = ((seen.st_dev, seen.st_ino), Status::from(seen));
                if !same_times(&status, &found.status) {
                    return true;
                }
                *seen_as = Some(numbers);
                numbers
            }
        };
        // Mappings show the number of the whole overlay as the device, which may differ from
        // what stat(2) shows for a file; its directories have it.
        let whole = nix::sys::stat::fstat(view).map_or(numbers.0, |top| top.st_dev);
        self.mapped.contains(&numbers) || self.mapped.contains(&(whole, numbers.1))
    }
}

fn same_times(left: &Status, right: &Status) -> bool {
    let times = |status: &Status| -> (Timestamp, Timestamp, u64) {
        (status.stamp.modified, status.stamp.changed, status.stamp.size)
    };
    times(left) == times(right)
}

/// A file that is open as a place.
struct Opened {
    place: OwnedFd,
    status: Status,
    path: Vec<u8>,
    regular: bool,
}
