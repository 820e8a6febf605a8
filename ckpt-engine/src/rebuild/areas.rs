//! Gives a process the areas of a layout.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};

use ckpt_format::memory::{Advice, Area, Backing, PAGE};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{Bone, GATE, Inconsistency, RebuildError, Skeleton, TASK_SIZE};
use crate::{
    areas::{AddressSpace, kept, vdso},
    bits32,
    inject::{Batch, Done, Gate, Vdso},
    ipc,
    procfs::ProcError,
    ranges::Ranges,
};

const ARCH_MAP_VDSO_32: u64 = 0x2002;
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const MAP_DROPPABLE: i32 = 8;
const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;

/// Reads the areas of one of our own processes.
pub(super) fn read_space(host: i32) -> Result<AddressSpace, ProcError> {
    AddressSpace::read(host)
}

/// How long the vdso with its data pages is: the same in every process of this kernel.
pub(super) fn vdso_len(space: &AddressSpace) -> u64 {
    space.areas.iter().filter(|area| is_own(area)).map(Area::len).sum()
}

impl Skeleton {
    /// Unmaps, maps and protects until the process has exactly these areas.
    pub(super) fn reshape(
        &mut self,
        pid: i32,
        life: u64,
        areas: Vec<Area>,
    ) -> Result<(), RebuildError> {
        check_places(pid, &areas, self.vdso_len_for(pid, &areas)?)?;
        let bone = self.bone(pid)?;
        let good = match bone.life == life {
            true => kept(&bone.areas, &areas),
            false => Ranges::default(),
        };
        let mut work = Work::new(self, bone);
        let old: Ranges = bone.areas.iter().filter(is_mapped).map(bounds).collect();
        for (start, end) in old.without(&good).iter() {
            work.unmap(start, end);
            work.flush_when_full()?;
        }
        work.vdso(&areas, &good);
        // First, so that what is new beside it can join it.
        work.adjust(&areas, &good)?;
        for (index, area) in areas.iter().enumerate().filter(|(_, area)| is_mapped(area)) {
            let fresh = Ranges::from_iter([bounds(area)]).without(&good);
            if fresh.is_empty() {
                continue;
            }
            let apart = neighbours(&areas, index, &good);
            work.set_apart(&apart, area.advice, true);
            for (start, end) in fresh.iter() {
                work.map(area, start, end)?;
                work.advise(area.advice, Advice::default(), start, end);
                work.flush_when_full()?;
            }
            work.set_apart(&apart, area.advice, false);
        }
        work.flush()?;
        if let Some(bone) = self.processes.get_mut(&pid) {
            if bone.life != life {
                bone.guards.clear();
            }
            bone.areas = areas;
            bone.life = life;
            // What was meant for an area that has gone is not meant for its successor.
            bone.late.retain(|&address, _| good.covers(address, address + 1));
        }
        Ok(())
    }

    /// How long the vdso that a process with these areas gets will be, with its data pages.
    fn vdso_len_for(&self, pid: i32, areas: &[Area]) -> Result<u64, RebuildError> {
        match vdso(areas) {
            Some(Vdso { is_32_bit: true, .. }) => {
                let host = bits32::host().ok_or(RebuildError::Bits32 { pid })?;
                Ok(host.len)
            }
            _ => Ok(self.vdso_len),
        }
    }
}

/// Areas that are made by mmap(2).
fn is_mapped(area: &&Area) -> bool {
    area.backing != Backing::Vsyscall
}

fn is_own(area: &Area) -> bool {
    area.backing.is_vdso()
}

fn bounds(area: &Area) -> (u64, u64) {
    (area.start, area.end)
}

/// What another area has at an end of this one: its range, and its advice.
type Neighbour = (u64, u64, Advice);

/// What other areas have at the ends of this one.
///
/// The kernel could join a new part of this area to that neighbour instead of to the part that
/// is there already. Once each side has pages of its own the kernel joins them no more, and a
/// program that resizes or moves the area (mremap(2)) fails, because to the kernel it is two.
/// So the neighbours are set apart while an area grows, by flags that cost nothing to change.
fn neighbours(areas: &[Area], index: usize, good: &Ranges) -> Vec<Neighbour> {
    let area = &areas[index];
    let grows = good.within(area.start, area.end).next().is_some();
    let left = index.checked_sub(1).map(|left| &areas[left]).filter(|it| it.end == area.start);
    let right = areas.get(index + 1).filter(|it| it.start == area.end);
    let could_join = |other: &&Area| {
        grows
            && other.shared == area.shared
            && !other.advice.droppable
            && !area.advice.droppable
            && match (&other.backing, &area.backing) {
                (Backing::Anonymous { .. }, Backing::Anonymous { .. }) => true,
                (other, own) => matches!(own, Backing::File { .. }) && other == own,
            }
    };
    let whole = left.filter(could_join).map(|left| (left.start, left.end, left.advice));
    // Of the one to the right nothing is there yet but what has stayed.
    let stayed = right.filter(could_join).and_then(|right| {
        let (low, high) = good.within(right.start, right.end).next()?;
        (low == right.start).then_some((right.start, high, right.advice))
    });
    whole.into_iter().chain(stayed).collect()
}

/// Refuses areas that overlap, leave the address space, or lie where the gate is.
fn check_places(pid: i32, areas: &[Area], vdso_len: u64) -> Result<(), RebuildError> {
    let mut last = 0;
    for area in areas.iter().filter(is_mapped) {
        let beside_gate = area.end <= GATE || area.start >= GATE + Gate::SIZE;
        if area.start < last || area.end <= area.start || area.end > TASK_SIZE || !beside_gate {
            return Err(RebuildError::Stream(Inconsistency::AreaOutside(pid)));
        }
        last = area.end;
    }
    let vdso: u64 = areas.iter().filter(|area| is_own(area)).map(Area::len).sum();
    match vdso == 0 || vdso == vdso_len {
        true => Ok(()),
        false => Err(RebuildError::Stream(Inconsistency::AreaOutside(pid))),
    }
}

/// The protection of an area until all its pages are there: nobody may write huge pages against
/// theirs, not even by `/proc/PID/mem`.
fn while_filled(area: &Area) -> u8 {
    match area.backing {
        Backing::Huge { .. } => area.protection | libc::PROT_WRITE as u8,
        _ => area.protection,
    }
}

/// The flags of mmap(2) for huge pages of this size in bytes.
fn huge_pages(page: u64) -> Result<i32, RebuildError> {
    match page.is_power_of_two() && page > PAGE {
        true => {
            let size = page.trailing_zeros().cast_signed() << libc::MAP_HUGE_SHIFT;
            Ok(libc::MAP_HUGETLB | size)
        }
        false => Err(Inconsistency::HugePages(page).into()),
    }
}

/// A batch of calls for one process, with the paths that it opens.
pub(super) struct Work<'a> {
    skeleton: &'a Skeleton,
    bone: &'a Bone,
    batch: Batch,
    opened: Vec<(usize, String)>,
}

impl<'a> Work<'a> {
    pub(super) fn new(skeleton: &'a Skeleton, bone: &'a Bone) -> Self {
        Self { skeleton, bone, batch: skeleton.gate.batch(), opened: Vec::new() }
    }

    pub(super) fn unmap(&mut self, start: u64, end: u64) {
        self.batch.call("munmap", libc::SYS_munmap, &[start, end - start]);
    }

    fn flush_when_full(&mut self) -> Result<(), RebuildError> {
        if self.batch.is_nearly_full() { self.flush() } else { Ok(()) }
    }

    pub(super) fn flush(&mut self) -> Result<(), RebuildError> {
        let batch = std::mem::replace(&mut self.batch, self.skeleton.gate.batch());
        let opened = std::mem::take(&mut self.opened);
        if batch.is_empty() {
            return Ok(());
        }
        let done = batch.run(&self.bone.thread)?;
        self.check(&done, opened)
    }

    fn check(&self, done: &Done, opened: Vec<(usize, String)>) -> Result<(), RebuildError> {
        for (index, path) in opened {
            done.value(index).map_err(|source| RebuildError::Open {
                pid: self.bone.pid,
                path,
                source,
            })?;
        }
        done.all().map_err(self.bone.failed("lay out its memory"))
    }

    /// The kernel maps the vdso with all its data pages in one go at the wanted place.
    fn vdso(&mut self, areas: &[Area], good: &Ranges) {
        let Some(first) = areas.iter().find(|area| is_own(area)) else { return };
        if good.within(first.start, first.end).next().is_some() {
            return;
        }
        let which = match vdso(areas) {
            Some(Vdso { is_32_bit: true, .. }) => ARCH_MAP_VDSO_32,
            _ => ARCH_MAP_VDSO_64,
        };
        self.batch.call("arch_prctl", libc::SYS_arch_prctl, &[which, first.start]);
    }

    pub(super) fn map(&mut self, area: &Area, start: u64, end: u64) -> Result<(), RebuildError> {
        let mut flags = libc::MAP_FIXED_NOREPLACE;
        if self.skeleton.waits(self.bone, area) {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let protection = u64::from(area.protection);
            let arguments = [start, end - start, protection, flags as u64, u64::MAX, 0];
            self.batch.call("mmap", libc::SYS_mmap, &arguments);
            return Ok(());
        }
        flags |= match (area.shared, area.advice.droppable) {
            (true, _) => libc::MAP_SHARED,
            (false, true) => MAP_DROPPABLE,
            (false, false) => libc::MAP_PRIVATE,
        };
        if area.grows_down {
            flags |= libc::MAP_GROWSDOWN;
        }
        if area.advice.no_reserve {
            flags |= libc::MAP_NORESERVE;
        }
        let mut fd = u64::MAX;
        match &area.backing {
            Backing::Vdso | Backing::Vdso32 | Backing::Vvar | Backing::Vsyscall => return Ok(()),
            // Until a ring is made, other memory holds its place.
            Backing::Anonymous { .. } | Backing::Ring | Backing::Frames => {
                flags |= libc::MAP_ANONYMOUS
            }
            Backing::Huge { page } => flags |= libc::MAP_ANONYMOUS | huge_pages(*page)?,
            Backing::File { path, .. } => {
                self.open(path, area.shared && area.may_write);
                fd = 0;
            }
            Backing::Shared { object } if ipc::is_segment(*object) => {
                return self.attach(area, start, end);
            }
            Backing::Shared { object } => {
                self.receive_shared(*object, area.shared && area.may_write)?;
                fd = 0;
            }
        }
        let protection = u64::from(while_filled(area));
        let offset = if fd == 0 { area.offset + (start - area.start) } else { 0 };
        let arguments = [start, end - start, protection, flags as u64, fd, offset];
        self.batch.call("mmap", libc::SYS_mmap, &arguments);
        if fd == 0 {
            self.batch.call("close", libc::SYS_close, &[0]);
        }
        if let Backing::Anonymous { name: Some(name) } = &area.backing {
            self.name(Some(name), start, end);
        }
        Ok(())
    }

    fn name(&mut self, name: Option<&str>, start: u64, end: u64) {
        let name = name.map_or(0, |name| self.batch.text(name));
        let arguments = [PR_SET_VMA, PR_SET_VMA_ANON_NAME, start, end - start, name];
        self.batch.call("prctl", libc::SYS_prctl, &arguments);
    }

    /// Sets [`neighbours`] apart, or makes them as they were. Apart they differ from an area
    /// without advice, and from this one with all its own.
    fn set_apart(&mut self, neighbours: &[Neighbour], own: Advice, apart: bool) {
        for &(start, end, other) in neighbours {
            let is_dumped = if apart { own.dont_dump } else { !other.dont_dump };
            let access = match (apart || other.random, other.sequential) {
                (true, _) => libc::MADV_RANDOM,
                (false, true) => libc::MADV_SEQUENTIAL,
                (false, false) => libc::MADV_NORMAL,
            };
            let dump = if is_dumped { libc::MADV_DODUMP } else { libc::MADV_DONTDUMP };
            for advice in [dump, access] {
                let arguments = [start, end - start, advice as u64];
                self.batch.call("madvise", libc::SYS_madvise, &arguments);
            }
        }
    }

    /// Opens a file of the VE: always as descriptor 0, the lowest and free.
    fn open(&mut self, path: &str, write: bool) {
        let access = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let flags = (access | libc::O_CLOEXEC) as u64;
        let address = self.batch.text(path);
        let index =
            self.batch.call("openat", libc::SYS_openat, &[libc::AT_FDCWD as u64, address, flags]);
        self.opened.push((index, path.to_owned()));
    }

    /// Passes a shared object to the process: as descriptor 0 as well.
    fn receive_shared(&mut self, object: u64, write: bool) -> Result<(), RebuildError> {
        match write {
            true => self.skeleton.pass_object_to_write(&mut self.batch, object)?,
            false => self.skeleton.pass_object(&mut self.batch, object)?,
        };
        self.flush_when_full()
    }

    /// Attaches a segment. A program may have kept a part of it only, or have moved it.
    fn attach(&mut self, area: &Area, start: u64, end: u64) -> Result<(), RebuildError> {
        let Backing::Shared { object } = area.backing else { return Ok(()) };
        let size = self.skeleton.shared(object)?.object.size.next_multiple_of(PAGE);
        // The number of a segment is the lower half of its id.
        let id = object & u64::from(u32::MAX);
        let mut flags = if area.may_write { 0 } else { libc::SHM_RDONLY };
        if area.protection & libc::PROT_EXEC as u8 != 0 {
            flags |= libc::SHM_EXEC;
        }
        if area.offset == 0 && start == area.start && end - start == size {
            self.batch.call("shmat", libc::SYS_shmat, &[id, start, flags as u64]);
        } else {
            self.flush()?;
            let attach = self.batch.call("shmat", libc::SYS_shmat, &[id, 0, flags as u64]);
            let batch = std::mem::replace(&mut self.batch, self.skeleton.gate.batch());
            let done = batch.run(&self.bone.thread)?;
            let whole = done.value(attach).map_err(self.bone.failed("attach shared memory"))?;
            let part = whole + area.offset + (start - area.start);
            let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let (len, behind) = (end - start, part + (end - start));
            self.batch.call("mremap", libc::SYS_mremap, &[part, len, len, how, start]);
            for (low, high) in [(whole, part), (behind, whole + size)] {
                if low < high {
                    self.batch.call("munmap", libc::SYS_munmap, &[low, high - low]);
                }
            }
        }
        let attached = libc::PROT_READ | if area.may_write { libc::PROT_WRITE } else { 0 };
        if i32::from(area.protection & 3) != attached {
            let arguments = [start, end - start, u64::from(area.protection)];
            self.batch.call("mprotect", libc::SYS_mprotect, &arguments);
        }
        Ok(())
    }

    /// Protection and advice of what stays but has changed.
    fn adjust(&mut self, areas: &[Area], good: &Ranges) -> Result<(), RebuildError> {
        let old_areas = &self.bone.areas;
        for area in areas.iter().filter(|area| is_mapped(area) && !is_own(area)) {
            let first = old_areas.partition_point(|old| old.end <= area.start);
            for old in old_areas[first..].iter().take_while(|old| old.start < area.end) {
                let (start, end) = (old.start.max(area.start), old.end.min(area.end));
                if !good.covers(start, end) {
                    continue;
                }
                if let (Backing::Anonymous { name }, Backing::Anonymous { name: before }) =
                    (&area.backing, &old.backing)
                    && name != before
                {
                    self.name(name.as_deref(), start, end);
                }
                if old.protection != area.protection {
                    let arguments = [start, end - start, u64::from(while_filled(area))];
                    self.batch.call("mprotect", libc::SYS_mprotect, &arguments);
                }
                self.advise(area.advice, old.advice, start, end);
                self.flush_when_full()?;
            }
        }
        Ok(())
    }

    pub(super) fn advise(&mut self, new: Advice, old: Advice, start: u64, end: u64) {
        let pairs = [
            (new.dont_fork, old.dont_fork, libc::MADV_DONTFORK, libc::MADV_DOFORK),
            (new.dont_dump, old.dont_dump, libc::MADV_DONTDUMP, libc::MADV_DODUMP),
            (new.wipe_on_fork, old.wipe_on_fork, libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
            (new.huge, old.huge, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
            (new.no_huge, old.no_huge, libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE),
            (new.mergeable, old.mergeable, libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
            (new.sequential, old.sequential, libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
            (new.random, old.random, libc::MADV_RANDOM, libc::MADV_NORMAL),
        ];
        for (new, old, on, off) in pairs {
            if new != old {
                let advice = if new { on } else { off };
                let arguments = [start, end - start, advice as u64];
                self.batch.call("madvise", libc::SYS_madvise, &arguments);
            }
        }
        if new.locked != old.locked {
            let (name, number) = match new.locked {
                true => ("mlock2", libc::SYS_mlock2),
                false => ("munlock", libc::SYS_munlock),
            };
            // MLOCK_ONFAULT: the pages come later, and must not be made here.
            let flags = u64::from(new.locked);
            self.batch.call(name, number, &[start, end - start, flags]);
        }
    }
}

/// The structures that recvmsg(2) needs for descriptors, in the data of a batch.
pub(super) struct Message {
    header: u64,
    /// Where the received descriptor numbers will stand.
    pub(super) numbers: u64,
}

impl Message {
    pub(super) fn add(batch: &mut Batch, count: usize) -> Self {
        let byte = batch.room(8);
        let iov = batch.bytes(&words(&[byte, 1]));
        let space = (16 + 4 * count).next_multiple_of(8);
        let control = batch.room(space);
        let header = batch.bytes(&words(&[0, 0, iov, 1, control, space as u64, 0]));
        Self { header, numbers: control + 16 }
    }

    pub(super) fn receive(&self, batch: &mut Batch, channel: u64) -> usize {
        batch.call("recvmsg", libc::SYS_recvmsg, &[channel, self.header, 0])
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Sends descriptors to whichever process receives next.
pub(super) fn send_descriptors(channel: &impl AsRawFd, fds: &[RawFd]) -> io::Result<()> {
    let data = [IoSlice::new(&[0])];
    let control = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(channel.as_raw_fd(), &data, &control, MsgFlags::MSG_DONTWAIT, None)?;
    Ok(())
}

impl From<Inconsistency> for RebuildError {
    fn from(inconsistency: Inconsistency) -> Self {
        Self::Stream(inconsistency)
    }
}
