//! One tracked process: its areas, its userfaultfd, and the pages that the target has of it.

mod leave;
mod register;
mod scan;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
    sync::Arc,
};

use ckpt_format::{
    container::Namespaces,
    memory::{Area, Backing, PAGE, Run, SharedObject, Space},
    stream::{AREAS_MAX, Record},
};

use self::scan::Standing;
use super::{
    Output, Sink, TrackError,
    direct::Doubted,
    sharing::{common, has_shared},
};
use crate::{
    aio,
    areas::{AddressSpace, heritage, kept},
    container::Spaces,
    inject::{InjectError, memory},
    procfs::{self, MapLine, ProcError},
    ranges::Ranges,
    surgeon::{AreasMark, Patient, Surgeon},
    sys::{
        pagemap::{self, Query, category},
        task,
        userfault::Tracking,
        vm,
    },
};

/// How much page data is read at once, in bytes: each piece costs some wake-ups of threads, and must
/// still be in the cache of a processor when it is encrypted.
const BLOCK: u64 = 512 << 10;

/// How many pages are looked at to see whether two processes have some in common.
const SAMPLE: u64 = 256;

/// A process under tracking.
#[derive(Debug)]
pub struct Tracked {
    host: i32,
    /// Its first thread, where that has ended: `host` is another one then.
    ended: Option<i32>,
    inner: i32,
    start_time: u64,
    life: Option<Life>,
    namespaces: Option<Namespaces>,
    /// What the kernel said of them before they were looked at.
    places: Option<[u64; 9]>,
    /// Whether it says the same still.
    is_in_place: bool,
}

/// The time between two execve(2) calls: one address space.
#[derive(Debug)]
struct Life {
    number: u64,
    maps: File,
    /// What it said last: the names of files change without a change of the areas.
    text: String,
    /// The files in it, each once.
    names: Arc<str>,
    smaps: File,
    /// What the kernel said of the areas before they were read.
    mark: Option<AreasMark>,
    pagemap: File,
    memory: File,
    tracking: Option<Tracking>,
    space: AddressSpace,
    /// Pages that the target has, zeros not counted.
    sent: Ranges,
    /// Pages that were due but could not be read.
    owed: Ranges,
    /// Where the target has made its areas anew: whatever is there is due, written or not.
    anew: Ranges,
    /// Whether the target was told of guards.
    guarded: bool,
    /// The areas as the target was told of them.
    announced: Option<Vec<Area>>,
    /// Where the target's copy began with what the parent's had: a page that both still have in
    /// common need not be sent.
    inherited: Ranges,
    /// What was sent and may have been written by a device since.
    doubted: Doubted,
    /// What was due in the last round while it ran.
    hot: Ranges,
    /// What was due when it stood still, and is to come when it runs on the target.
    left: Ranges,
}

impl Tracked {
    pub(super) fn new(host: i32, inner: i32, start_time: u64) -> Self {
        Self {
            host,
            ended: None,
            inner,
            start_time,
            life: None,
            namespaces: None,
            places: None,
            is_in_place: false,
        }
    }

    /// The same for one whose first thread has ended, if there is one given.
    pub(super) fn with_ended(self, ended: Option<i32>) -> Self {
        Self { ended, ..self }
    }

    /// True once its namespaces are known.
    pub(super) fn is_placed(&self) -> bool {
        self.namespaces.is_some()
    }

    /// Finds the namespaces that it is in now; `places` is what the kernel said before.
    pub(super) fn place(
        &mut self,
        spaces: &Spaces,
        places: Option<[u64; 9]>,
    ) -> Result<(), TrackError> {
        let found = spaces.number(self.host).map_err(|source| gone(self.host, "ns", source))?;
        self.namespaces = Some(found.ok_or(TrackError::Unshared { pid: self.inner })?);
        // Those that were found are held by us.
        (self.places, self.is_in_place) = (places, places.is_some());
        Ok(())
    }

    /// Takes notice of what the kernel says now of its namespaces.
    pub(super) fn compare_places(&mut self, places: Option<[u64; 9]>) {
        self.is_in_place = places.is_some() && places == self.places;
    }

    /// True if its namespaces are still those that were looked at; otherwise that is not known.
    pub fn is_in_place(&self) -> bool {
        self.is_in_place
    }

    /// The namespaces that it was in when they were looked at last.
    pub fn namespaces(&self) -> Namespaces {
        self.namespaces.unwrap_or_default()
    }

    /// The process's number on the host, or that of a thread if the first one has ended.
    pub fn host(&self) -> i32 {
        self.host
    }

    /// The process's number inside the VE.
    pub fn inner(&self) -> i32 {
        self.inner
    }

    /// When it started, in clock ticks since boot.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    pub(super) fn life(&self) -> u64 {
        self.life.as_ref().map_or(0, |life| life.number)
    }

    /// What must be known to capture it.
    pub fn patient(&self) -> Patient {
        let space = self.space();
        let rings = aio::any(&space.areas);
        let ipc = self.namespaces().ipc;
        let (host, ended, inner) = (self.host, self.ended, self.inner);
        Patient { host, ended, inner, vdso: space.vdso(), ipc, rings }
    }

    /// The areas as last read.
    pub fn space(&self) -> &AddressSpace {
        static NONE: std::sync::LazyLock<AddressSpace> =
            std::sync::LazyLock::new(AddressSpace::default);
        self.life.as_ref().map_or(&NONE, |life| &life.space)
    }

    /// Reads the areas again, unless they are as they were: `mark` was read before. Notices an
    /// execve(2) by the old address space being gone; starts the tracking where there is none yet,
    /// if somebody is given to do it.
    pub(super) fn refresh(
        &mut self,
        lives: &mut u64,
        surgeon: Option<&Surgeon>,
        mark: Option<AreasMark>,
    ) -> Result<(), TrackError> {
        let maps = match &mut self.life {
            Some(life) => {
                read_again(&mut life.maps).map_err(|source| gone(self.host, "maps", source))?
            }
            None => String::new(),
        };
        let same = |life: &Life| life.text == maps && mark.is_some() && life.mark == mark;
        if maps.is_empty() {
            self.life = None;
            // What it will execute could not be told from the memory that it borrows.
            if borrows_memory(self.host) {
                return Ok(());
            }
            *lives += 1;
            let (life, maps) = Life::open(self.host, *lives)?;
            self.life = Some(life);
            self.update(maps, mark)?;
        } else if !self.life.as_ref().is_some_and(same) {
            self.update(maps, mark)?;
        }
        self.arm(surgeon)
    }

    fn update(&mut self, maps: String, mark: Option<AreasMark>) -> Result<(), TrackError> {
        let Some(life) = &mut self.life else { return Ok(()) };
        let (space, smaps) = AddressSpace::told(self.host, || read_again(&mut life.smaps))
            .map_err(|source| gone(self.host, "smaps", source))?;
        let good = kept(&life.space.areas, &space.areas);
        life.sent = life.sent.common(&good);
        life.owed = life.owed.common(&good);
        life.inherited = life.inherited.common(&good);
        life.doubted.keep(&good);
        let all: Ranges = space.areas.iter().map(|area| (area.start, area.end)).collect();
        for (start, end) in all.without(&good).iter() {
            life.anew.insert(start, end);
        }
        life.anew = life.anew.common(&all);
        life.space = space;
        life.mark = mark;
        // What has changed between the two looks is looked at again.
        let lines: Vec<MapLine> =
            procfs::parse_smaps(&smaps).into_iter().map(|(line, _)| line).collect();
        life.names = names(&lines);
        life.text = if lines == procfs::parse_maps(&maps) { maps } else { String::new() };
        Ok(())
    }

    /// The files that it has mapped, if its areas have not changed since they were read.
    pub(super) fn names_if(&self, mark: Option<AreasMark>) -> Option<Arc<str>> {
        let life = self.life.as_ref()?;
        let same = self.is_placed() && mark.is_some() && life.mark == mark && !life.text.is_empty();
        same.then(|| life.names.clone())
    }

    /// Whether they still have the names that they had.
    pub(super) fn has_same_names(&mut self) -> bool {
        let same = |life: &mut Life| read_again(&mut life.maps).is_ok_and(|maps| maps == life.text);
        self.life.as_mut().is_some_and(same)
    }

    /// Starts the tracking where there is none yet, if somebody is given to do it.
    fn arm(&mut self, surgeon: Option<&Surgeon>) -> Result<(), TrackError> {
        let Some(life) = &mut self.life else { return Ok(()) };
        // One that has been stopped by a signal meanwhile would show our own stop instead.
        if let Some(surgeon) = surgeon
            && life.tracking.is_none()
            && !is_stopped(self.host)
        {
            let vdso = life.space.vdso().ok_or(InjectError::NoVdso);
            match vdso.and_then(|vdso| surgeon.arm(self.host, vdso)) {
                Ok(tracking) => life.tracking = Some(tracking),
                Err(source @ InjectError::Surgeon { .. }) => {
                    return Err(TrackError::Arm { pid: self.inner, source });
                }
                // It is ending, or does not stop now. Without tracking all counts as written.
                Err(error) => tracing::debug!(pid = self.inner, %error, "not tracked yet"),
            }
        }
        Ok(())
    }

    /// True while the target has nothing of this life.
    pub(super) fn is_new(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.announced.is_none())
    }

    /// Whether any of its first pages is one of the parent's.
    pub(super) fn shares_with(&self, parent: &Self) -> bool {
        let (Some(life), Some(parent)) = (&self.life, &parent.life) else { return false };
        let mut first = Ranges::default();
        for area in life.space.areas.iter().filter(|area| can_be_inherited(area)) {
            let found = |start, end: u64| first.insert(start, end.min(start + PAGE * SAMPLE));
            let no_file = category::FILE | category::ZERO;
            let any_of = category::PRESENT | category::SWAPPED;
            let there = Query { mask: no_file, inverted: no_file, any_of, ..Query::default() };
            // One that is ending shares nothing.
            let _ = pagemap::scan(&life.pagemap, area.start, area.end, there, found);
            if first.iter().map(|(start, end)| end - start).sum::<u64>() >= PAGE * SAMPLE {
                break;
            }
        }
        common(&life.pagemap, &parent.pagemap, &first).is_ok_and(|common| !common.is_empty())
    }

    /// The target makes it as a copy of its parent as it stands there now.
    pub(super) fn inherit(&mut self, parent: &Self) {
        let (Some(life), Some(parent)) = (&mut self.life, &parent.life) else { return };
        let told = parent.announced.as_deref().unwrap_or_default();
        let begins = kept(&heritage(told), &life.space.areas);
        life.sent = parent.sent.common(&begins);
        let plain = life.space.areas.iter().filter(|area| can_be_inherited(area));
        let plain: Ranges = plain.map(|area| (area.start, area.end)).collect();
        life.inherited = life.sent.common(&plain).without(&parent.owed);
    }

    /// The target ends it and makes it anew: all must be sent again.
    pub(super) fn begin_again(&mut self, lives: &mut u64) {
        let Some(life) = &mut self.life else { return };
        *lives += 1;
        life.number = *lives;
        (life.sent, life.owed) = (Ranges::default(), Ranges::default());
        life.anew = life.space.areas.iter().map(|area| (area.start, area.end)).collect();
        (life.announced, life.inherited) = (None, Ranges::default());
    }

    /// Tells of the areas, if the target does not know them. An area that shows an object which
    /// is not in `shared` (gone again already) comes with the next round, or not at all.
    pub(super) fn send_areas<S: Sink>(
        &mut self,
        shared: &[SharedObject],
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let pid = self.inner;
        let Some(life) = &mut self.life else { return Ok(()) };
        let is_known = |area: &&Area| match area.backing {
            Backing::Shared { object } => {
                shared.binary_search_by_key(&object, |shared| shared.id).is_ok()
            }
            _ => true,
        };
        let known = || life.space.areas.iter().filter(is_known);
        if life.announced.as_ref().is_some_and(|told| told.iter().eq(known())) {
            return Ok(());
        }
        let areas: Vec<Area> = known().cloned().collect();
        let mut parts = areas.chunks(AREAS_MAX).peekable();
        while let Some(part) = parts.next() {
            let complete = parts.peek().is_none();
            output.send(Record::Areas { pid, areas: part.to_vec(), complete })?;
        }
        life.announced = Some(areas);
        Ok(())
    }

    /// Sends the pages written since the last time. In a frozen process also tells which pages
    /// have vanished, and with `leave` keeps back what can come later.
    pub(super) fn send_written<S: Sink>(
        &mut self,
        frozen: bool,
        leave: bool,
        parent: Option<&Self>,
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let pid = self.inner;
        let life = match &mut self.life {
            Some(life) => life,
            None if frozen => return Err(TrackError::Borrowed { pid }),
            None => return Ok(()),
        };
        if frozen && let Some((_, what)) = life.space.unsupported.first() {
            return Err(TrackError::Unsupported { pid, what });
        }
        let mut due = life.take_owed();
        let mut standing = Standing::default();
        if frozen {
            match life.scan_still(&mut due) {
                Ok(found) => standing = found,
                Err(source) => {
                    life.owed = due;
                    return Err(TrackError::Memory { pid, source });
                }
            }
        } else {
            life.register_new();
            for area in life.space.areas.iter().filter(|area| has_private_pages(area)) {
                // One that is gone again is missing in the next round.
                let _ = life.scan(area, &mut due);
            }
        }
        life.anew = Ranges::default();
        if let Some(parent) = parent.and_then(|parent| parent.life.as_ref()) {
            due = life.without_heritage(due, parent);
        }
        if aio::any(&life.space.areas) {
            due = life.doubted.settle(due, frozen.then_some(&standing.present));
        }
        if frozen {
            life.send_guards(pid, &standing.guards, output)?;
            let vanished = life.sent.without(&standing.present);
            let runs = vanished.iter().map(|(start, end)| run(start, end)).collect();
            output.drop_runs(Space::Process(pid), runs)?;
            life.sent = life.sent.without(&vanished);
        }
        due = life.sort_out(pid, due, frozen, leave, output)?;
        for (start, end) in blocks(&due) {
            life.send_block(self.host, pid, (start, end), output)?;
        }
        match frozen && !life.owed.is_empty() {
            true => Err(TrackError::Memory { pid, source: io::ErrorKind::InvalidData.into() }),
            false => Ok(()),
        }
    }
}

/// True while a process has the memory of its parent (vfork(2), posix_spawn(3)).
fn borrows_memory(host: i32) -> bool {
    let parent = procfs::Stat::read(host).and_then(|stat| stat.field(4, "ppid"));
    // What cannot be compared has ended, or is a process of the host.
    parent.is_ok_and(|parent| {
        let parent = procfs::stand_in(parent).unwrap_or(parent);
        task::share(host, parent, task::Common::Memory).unwrap_or(false)
    })
}

fn gone(host: i32, name: &str, source: io::Error) -> ProcError {
    ProcError::Read { path: procfs::path(host, name), source }
}

fn read_again(file: &mut File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    String::from_utf8(procfs::read_rest(file)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

impl Life {
    fn open(host: i32, number: u64) -> Result<(Self, String), ProcError> {
        let open =
            |name| File::open(procfs::path(host, name)).map_err(|source| gone(host, name, source));
        let (mut maps, smaps) = (open("maps")?, open("smaps")?);
        let pagemap = open("pagemap")?;
        let memory = memory(host).map_err(|source| gone(host, "mem", source))?;
        let text = read_again(&mut maps).map_err(|source| gone(host, "maps", source))?;
        let life = Self {
            number,
            maps,
            text: String::new(),
            names: "".into(),
            smaps,
            mark: None,
            pagemap,
            memory,
            tracking: None,
            space: AddressSpace::default(),
            sent: Ranges::default(),
            owed: Ranges::default(),
            anew: Ranges::default(),
            guarded: false,
            announced: None,
            inherited: Ranges::default(),
            doubted: Doubted::default(),
            hot: Ranges::default(),
            left: Ranges::default(),
        };
        Ok((life, text))
    }

    /// Takes out of `due` what the target's copy has from the parent's, and still like the parent.
    fn without_heritage(&self, due: Ranges, parent: &Self) -> Ranges {
        let candidates = due.common(&self.inherited);
        match common(&self.pagemap, &parent.pagemap, &candidates) {
            Ok(common) if !common.is_empty() => due.without(&common),
            // Nothing to save, or the parent is ending.
            _ => due,
        }
    }

    /// Tells of the guards of a frozen process, if there are any or were.
    fn send_guards<S: Sink>(
        &mut self,
        pid: i32,
        guards: &Ranges,
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        if guards.is_empty() && !self.guarded {
            return Ok(());
        }
        self.guarded = !guards.is_empty();
        let runs = guards.iter().map(|(start, end)| run(start, end)).collect();
        output.send(Record::Guards { pid, runs })
    }

    /// True where a page that was never written holds zeros.
    fn is_blank(&self, address: u64) -> bool {
        let areas = &self.space.areas;
        let index = areas.partition_point(|area| area.end <= address);
        areas.get(index).is_some_and(|area| matches!(area.backing, Backing::Anonymous { .. }))
    }

    /// Reads and sends one block of pages; what cannot be read now stays owed.
    fn send_block<S: Sink>(
        &mut self,
        host: i32,
        pid: i32,
        (start, end): (u64, u64),
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let len = (end - start) as usize;
        // That call would give the process copies of its own of pages that it shares.
        let copied = match has_shared(&self.pagemap, start, end) {
            Ok(false) => vm::copy_of_process(host, start, len),
            _ => Ok(Vec::new()),
        };
        let mut data = copied.unwrap_or_default();
        let mut good = data.len() as u64 / PAGE * PAGE;
        if good < end - start {
            data.resize(len, 0);
        }
        if good == 0 && self.memory.read_exact_at(&mut data, start).is_ok() {
            good = end - start;
        }
        // Areas that the program itself may not read give no data above.
        while good < end - start {
            let page = &mut data[good as usize..][..PAGE as usize];
            if self.memory.read_exact_at(page, start + good).is_err() {
                break;
            }
            good += PAGE;
        }
        if good > 0 {
            data.truncate(good as usize);
            let runs = [run(start, start + good)];
            output.pages(Space::Process(pid), &runs, data, |address| self.is_blank(address))?;
            self.sent.insert(start, start + good);
        }
        self.owed.insert(start + good, end);
        Ok(())
    }
}

/// Every file in these lines once, as they are called there.
fn names(lines: &[MapLine]) -> Arc<str> {
    let files = lines.iter().filter(|line| line.inode != 0);
    let mut files: Vec<_> = files.map(|it| (&it.device, it.inode, &it.name)).collect();
    files.sort_unstable();
    files.dedup();
    let lines = files.iter().map(|(device, inode, name)| format!("{device} {inode} {name}\n"));
    lines.collect::<String>().into()
}

fn run(start: u64, end: u64) -> Run {
    Run { start, pages: (end - start) / PAGE }
}

/// Cuts ranges into blocks of bounded size.
fn blocks(ranges: &Ranges) -> Vec<(u64, u64)> {
    ranges
        .iter()
        .flat_map(|(start, end)| {
            (start..end).step_by(BLOCK as usize).map(move |at| (at, end.min(at + BLOCK)))
        })
        .collect()
}

fn is_stopped(host: i32) -> bool {
    procfs::Stat::read(host).is_ok_and(|stat| stat.state == 'T')
}

/// Areas whose pages are a parent's until they are written. Merged memory (`MADV_MERGEABLE`) can
/// be the same for other reasons.
fn can_be_inherited(area: &Area) -> bool {
    has_private_pages(area) && !area.advice.mergeable
}

/// Areas whose pages belong to the process alone.
fn has_private_pages(area: &Area) -> bool {
    !area.shared && !area.backing.is_vdso() && area.backing != Backing::Vsyscall
}

#[cfg(test)]
mod tests;
