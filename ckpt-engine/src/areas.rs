//! From `/proc/PID/smaps` to [`Area`]s, and the difference between two layouts.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{linux::fs::MetadataExt, unix::ffi::OsStrExt},
};

use ckpt_format::memory::{Advice, Area, Backing, SharedKind, SharedObject};

use crate::{
    aio,
    inject::Vdso,
    ipc,
    layered::{self, Place, View},
    procfs::{self, AreaFlags, MapLine, ProcError},
    ranges::Ranges,
    sys::vm,
    unnamed,
};

/// The address space of one process as read from outside.
#[derive(Clone, Debug, Default)]
pub struct AddressSpace {
    /// The areas in ascending order.
    pub areas: Vec<Area>,
    /// The shared objects they show, by id, with the address range of one mapping of each.
    pub shared: HashMap<u64, (u64, u64)>,
    /// What cannot be moved: the name of the area and why.
    pub unsupported: Vec<(String, &'static str)>,
}

/// How often the areas of a process are read that changes them meanwhile.
const TRIES: u32 = 8;

impl AddressSpace {
    /// Reads the areas of a process.
    pub fn read(pid: i32) -> Result<Self, ProcError> {
        Ok(Self::told(pid, || procfs::read_text(pid, "smaps"))?.0)
    }

    /// By whoever reads `/proc/PID/smaps` of this process, which is read until it is of one moment;
    /// with what it says.
    pub(crate) fn told<E>(
        pid: i32,
        smaps: impl FnMut() -> Result<String, E>,
    ) -> Result<(Self, String), E> {
        let mut smaps = smaps;
        let mut tries = 0;
        loop {
            let text = smaps()?;
            let space = Self::parse(pid, &text);
            tries += 1;
            if space.is_of_one_moment() || tries == TRIES {
                return Ok((space, text));
            }
        }
    }

    /// Whether no area lies in another one. What the kernel tells in several pieces can be of several
    /// moments: an area that has grown meanwhile comes again in the next piece.
    fn is_of_one_moment(&self) -> bool {
        self.areas.windows(2).all(|two| two[0].end <= two[1].start)
    }

    /// From what `/proc/PID/smaps` of this process says: lines and flags of one moment.
    pub fn parse(pid: i32, smaps: &str) -> Self {
        let mut space = Self::default();
        let view = layered::view_of(pid);
        for (line, flags) in procfs::parse_smaps(smaps) {
            space.add(pid, &line, flags, view.as_deref());
        }
        // Without the one the other is of no use.
        if space.unsupported.iter().any(|(name, _)| name == VDSO) {
            space.areas.retain(|area| area.backing != Backing::Vvar);
        }
        space
    }

    fn add(&mut self, pid: i32, line: &MapLine, flags: AreaFlags, view: Option<&View>) {
        if let Some(why) = unsupported(pid, line, flags) {
            self.unsupported.push((line.name.clone(), why));
            return;
        }
        let mut backing = match flags.huge_page {
            page @ 1.. if !line.shared && line.name == HUGE => Backing::Huge { page },
            1.. if line.name.starts_with(SEGMENT) => segment(pid, line),
            _ => backing(pid, line),
        };
        if let (Backing::File { path, .. }, Some(view)) = (&mut backing, view) {
            match view.place(pid, line) {
                Place::AsNamed => {}
                Place::At(seen) => *path = seen,
                Place::Hidden => {
                    let why = "a file that an overlay has shown and shows no more";
                    self.unsupported.push((line.name.clone(), why));
                }
            }
        }
        if let Backing::Shared { object } = backing {
            self.shared.insert(object, (line.start, line.end));
        }
        self.areas.push(Area {
            start: line.start,
            end: line.end,
            protection: line.protection,
            shared: line.shared,
            grows_down: flags.grows_down,
            may_write: flags.may_write,
            offset: match backing {
                Backing::Huge { .. } => 0,
                Backing::Shared { .. } => line.offset,
                _ if line.inode == 0 => 0,
                _ => line.offset,
            },
            backing,
            advice: flags.advice,
        });
    }

    /// The vdso.
    pub fn vdso(&self) -> Option<Vdso> {
        vdso(&self.areas)
    }
}

/// The vdso among areas.
pub fn vdso(areas: &[Area]) -> Option<Vdso> {
    areas.iter().find_map(|area| {
        let is_32_bit = match area.backing {
            Backing::Vdso => false,
            Backing::Vdso32 => true,
            _ => return None,
        };
        Some(Vdso { start: area.start, is_32_bit })
    })
}

/// What maps shows for `MAP_ANONYMOUS | MAP_HUGETLB`.
const HUGE: &str = "/anon_hugepage (deleted)";

fn unsupported(pid: i32, line: &MapLine, flags: AreaFlags) -> Option<&'static str> {
    if is_own(line) {
        (line.name == VDSO && machine(pid, line) == Machine::X32)
            .then_some("a program of the x32 interface")
    } else if line.name.starts_with("socket:[") && !is_frames(pid, line) {
        Some("memory of a socket that is no ring of frames")
    } else if flags.io {
        Some("memory of a device")
    } else if flags.shadow_stack {
        Some("a shadow stack")
    } else if flags.userfault {
        Some("memory served by the program's own userfaultfd")
    } else if line.name.starts_with("anon_inode:") {
        Some("memory of the kernel")
    } else {
        None
    }
}

/// How maps calls it.
pub(crate) const VDSO: &str = "[vdso]";

/// What every process has from the kernel.
fn is_own(line: &MapLine) -> bool {
    matches!(line.name.as_str(), VDSO | "[vvar]" | "[vvar_vclock]" | "[vsyscall]")
}

/// What the code of a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    X86_64,
    I386,
    X32,
}

/// The kernel's own code in a process tells; that of a program of 32 bits lies low.
pub(crate) fn machine(pid: i32, vdso: &MapLine) -> Machine {
    const HEADER: usize = 20;
    const CLASS_32: u8 = 1;
    const MACHINE_I386: [u8; 2] = [3, 0];
    if vdso.end > 1 << 32 {
        return Machine::X86_64;
    }
    let mut header = [0; HEADER];
    match vm::read_process(pid, &mut header, &[(vdso.start, HEADER)]) {
        Ok(HEADER) if header[4] != CLASS_32 => Machine::X86_64,
        Ok(HEADER) if header[18..] == MACHINE_I386 => Machine::I386,
        Ok(HEADER) => Machine::X32,
        // It is going.
        _ => Machine::X86_64,
    }
}

fn backing(pid: i32, line: &MapLine) -> Backing {
    match line.name.as_str() {
        VDSO if machine(pid, line) == Machine::I386 => Backing::Vdso32,
        VDSO => Backing::Vdso,
        "[vvar]" | "[vvar_vclock]" => Backing::Vvar,
        "[vsyscall]" => Backing::Vsyscall,
        _ if aio::is_ring(line) => Backing::Ring,
        name if name.starts_with("socket:[") => Backing::Frames,
        _ if is_segment(line) => segment(pid, line),
        _ if line.inode == 0 => {
            let name = line.name.strip_prefix("[anon:").and_then(|name| name.strip_suffix(']'));
            Backing::Anonymous { name: name.map(str::to_owned) }
        }
        _ if line.device == shm_device() => Backing::Shared { object: line.inode },
        path if path.ends_with(" (deleted)") => {
            // Gone again already, or a name that only looks so: then it is found by that.
            match unnamed::mapped_id(pid, line.start, line.end) {
                Ok(object) => Backing::Shared { object },
                Err(_) => Backing::File { path: path.to_owned(), inode: line.inode },
            }
        }
        path => Backing::File { path: path.to_owned(), inode: line.inode },
    }
}

/// Whether it shows the ring of a packet socket in the process's network. A file has a path.
fn is_frames(pid: i32, line: &MapLine) -> bool {
    let table = std::fs::read_to_string(procfs::path(pid, "net/packet")).unwrap_or_default();
    let inode = line.inode.to_string();
    line.shared && table.lines().any(|socket| socket.split_whitespace().nth(8) == Some(&inode))
}

/// How maps shows a System V segment. One of huge pages is in a file system of such, where nobody
/// else has files with names.
const SEGMENT: &str = "/SYSV";

/// Whether it shows a System V segment of usual pages.
fn is_segment(line: &MapLine) -> bool {
    line.name.starts_with(SEGMENT) && line.device == shm_device()
}

/// A segment has its own number, from 0 on, in place of an inode's.
fn segment(pid: i32, line: &MapLine) -> Backing {
    Backing::Shared { object: ipc::segment_id(ipc::namespace_of(pid), line.inode) }
}

/// The device number, as maps shows it, of the kernel's own tmpfs where memfds and shared
/// anonymous memory live. A file of the VE with a misleading name is never on it.
fn shm_device() -> &'static str {
    static DEVICE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    DEVICE.get_or_init(|| {
        let device = crate::sys::task::memfd("probe")
            .map(File::from)
            .and_then(|file| file.metadata())
            .map_or(0, |metadata| metadata.st_dev());
        format!("{:02x}:{:02x}", libc::major(device), libc::minor(device))
    })
}

/// Opens the object behind an area of a process, and describes it. The process is in the IPC
/// namespace that has this number in the VE.
pub fn open_shared(
    pid: i32,
    (start, end): (u64, u64),
    object: u64,
    id_base: u32,
    namespace: u32,
) -> io::Result<(File, SharedObject)> {
    let path = procfs::path(pid, &format!("map_files/{start:x}-{end:x}"));
    let link = std::fs::read_link(&path)?;
    let link = link.as_os_str().as_bytes();
    let file = File::open(&path)?;
    if link.starts_with(SEGMENT.as_bytes()) && ipc::is_segment(object) {
        let segment = ipc::segment((pid, &file), object, namespace, id_base)?;
        return Ok((file, segment));
    }
    let described = match link.starts_with(b"/dev/zero") || link.starts_with(b"/[") {
        true => {
            let metadata = file.metadata()?;
            let (id, size) = (metadata.st_ino(), metadata.st_size());
            SharedObject { id, size, kind: SharedKind::Anonymous }
        }
        false => unnamed::describe(&file, link, id_base)?,
    };
    match described.id == object {
        true => Ok((file, described)),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The addresses at which `old` and `new` show the same thing, so that pages already sent stay
/// good there. Source and target both use this, and so agree.
///
/// Of each new area at most one old one is kept: where the source's kernel has merged two areas,
/// the target's may be unable to (each has an `anon_vma` of its own), and a program that moves or
/// resizes the whole (mremap(2)) would fail there. The smaller part is made anew.
pub fn kept(old: &[Area], new: &[Area]) -> Ranges {
    let mut kept = Ranges::default();
    let mut rest = old.iter().peekable();
    for area in new {
        while rest.next_if(|old| old.end <= area.start).is_some() {}
        let overlap = |old: &Area| (old.start.max(area.start), old.end.min(area.end));
        let largest = rest
            .clone()
            .take_while(|old| old.start < area.end)
            .filter(|old| same_content(old, area))
            .map(overlap)
            .max_by_key(|(start, end)| end - start);
        if let Some((start, end)) = largest {
            kept.insert(start, end);
        }
    }
    kept
}

/// What a child of a process with these areas begins with (fork(2)).
pub fn heritage(areas: &[Area]) -> Vec<Area> {
    let mut areas = areas.to_vec();
    areas.retain(|area| !area.advice.dont_fork);
    for area in &mut areas {
        // Locks are not inherited.
        (area.advice.locked, area.advice.locked_on_fault) = (false, false);
    }
    areas
}

/// Whether pages of an area may come when the VE runs already: plain memory of one process. Source
/// and target both use this, and so agree.
///
/// The rest is sent before: locked memory must be there, memory that is wiped or left out at
/// fork(2) has rules of its own, and the main stack is touched at once.
pub fn can_come_later(area: &Area) -> bool {
    let Advice {
        dont_fork,
        wipe_on_fork,
        mergeable,
        locked,
        locked_on_fault,
        droppable,
        sealed,
        ..
    } = area.advice;
    let special = dont_fork
        || wipe_on_fork
        || mergeable
        || locked
        || locked_on_fault
        || droppable
        || sealed
        || area.grows_down
        || area.shared;
    let is_plain = matches!(area.backing, Backing::Anonymous { .. });
    is_plain && !special && i32::from(area.protection) & libc::PROT_WRITE != 0
}

fn same_content(old: &Area, new: &Area) -> bool {
    let place = |area: &Area| match area.backing {
        Backing::Anonymous { .. } | Backing::Huge { .. } => 0,
        _ => area.start.wrapping_sub(area.offset),
    };
    let backing = match (&old.backing, &new.backing) {
        (Backing::Anonymous { .. }, Backing::Anonymous { .. }) => true,
        (old, new) => old == new,
    };
    backing
        && old.shared == new.shared
        && old.grows_down == new.grows_down
        && old.advice.no_reserve == new.advice.no_reserve
        && old.advice.droppable == new.advice.droppable
        && old.may_write == new.may_write
        && place(old) == place(new)
}

/// Areas for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::{Advice, Area, Backing};

    /// Private memory without a file, to be read and written.
    pub(crate) fn anonymous(start: u64, end: u64) -> Area {
        Area {
            start,
            end,
            protection: 3,
            shared: false,
            grows_down: false,
            may_write: true,
            offset: 0,
            backing: Backing::Anonymous { name: None },
            advice: Advice::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64, path: Option<&str>, offset: u64) -> Area {
        let backing = match path {
            Some(path) => Backing::File { path: path.to_owned(), inode: 1 },
            None => Backing::Anonymous { name: None },
        };
        Area { offset, backing, ..testing::anonymous(start, end) }
    }

    fn check(old: &[Area], new: &[Area], expected: &[(u64, u64)]) {
        assert_eq!(kept(old, new).iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn growth_and_splits_keep_what_was_there() {
        let heap = [area(0x1000, 0x3000, None, 0)];
        check(&heap, &[area(0x1000, 0x5000, None, 0)], &[(0x1000, 0x3000)]);
        let split = [area(0x1000, 0x2000, None, 0), area(0x2000, 0x3000, None, 0)];
        check(&heap, &split, &[(0x1000, 0x3000)]);
        check(&heap, &[area(0x4000, 0x5000, None, 0)], &[]);
    }

    #[test]
    fn areas_of_several_moments_are_told_by_their_places() {
        let space = |areas| AddressSpace { areas, ..AddressSpace::default() };
        let apart = vec![area(1, 3, None, 0), area(3, 4, None, 0), area(6, 7, None, 0)];
        assert!(space(apart).is_of_one_moment());
        // The first one has grown before the second piece was read.
        let again = vec![area(1, 3, None, 0), area(1, 5, None, 0), area(6, 7, None, 0)];
        assert!(!space(again).is_of_one_moment());
    }

    #[test]
    fn of_merged_areas_the_largest_is_kept() {
        let parts = [area(0x1000, 0x2000, None, 0), area(0x2000, 0x5000, None, 0)];
        check(&parts, &[area(0x1000, 0x5000, None, 0)], &[(0x2000, 0x5000)]);
    }

    #[test]
    fn another_file_or_place_in_it_keeps_nothing() {
        let old = [area(0x1000, 0x3000, Some("/a"), 0)];
        check(&old, &[area(0x1000, 0x3000, Some("/b"), 0)], &[]);
        check(&old, &[area(0x1000, 0x3000, Some("/a"), 0x1000)], &[]);
        check(&old, &[area(0x2000, 0x3000, Some("/a"), 0x1000)], &[(0x2000, 0x3000)]);
        check(&old, &[area(0x1000, 0x3000, None, 0)], &[]);
    }

    #[test]
    fn our_own_address_space_is_understood() {
        let pid = std::process::id() as i32;
        let space = AddressSpace::read(pid).unwrap();
        assert!(space.vdso().is_some());
        assert!(space.areas.iter().any(|area| area.grows_down));
        assert_eq!(space.unsupported, vec![]);
    }
}
