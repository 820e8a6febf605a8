//! Huge pages that are set aside (hugetlbfs): how many a VE needs, and how many a host has.
//!
//! A mapping takes its pages from the pool when it is made, unless it was made with
//! `MAP_NORESERVE`, and is refused if there are too few. So both are looked at before a move.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use ckpt_format::memory::Backing;

use crate::{
    areas::AddressSpace,
    ipc,
    procfs::{self, MapLine},
    sys::{
        pagemap::{self, Query, category},
        task,
    },
};

/// Bytes by the size of a page.
pub type Sizes = BTreeMap<u64, u64>;

/// What processes, as the host numbers them, have of huge pages, or are promised. What ends
/// meanwhile has nothing.
pub fn needed(hosts: &[i32]) -> Sizes {
    let mut sizes = Sizes::new();
    let mut objects: HashMap<(u64, u64), (u64, u64)> = HashMap::new();
    let mut private: HashMap<i32, Vec<(u64, u64)>> = HashMap::new();
    for &host in hosts {
        let Ok(maps) = procfs::read_text(host, "maps") else { continue };
        // The rest is dear to read.
        if !["/anon_hugepage (deleted)", "/memfd:", "/SYSV"].iter().any(|it| maps.contains(it)) {
            continue;
        }
        let parent = procfs::Stat::read(host).and_then(|stat| stat.field(4, "ppid")).unwrap_or(0);
        let Ok(smaps) = procfs::read_text(host, "smaps") else { continue };
        let space = AddressSpace::parse(host, &smaps);
        for area in &space.areas {
            let Backing::Huge { page } = area.backing else { continue };
            let bounds = (area.start, area.end);
            private.entry(host).or_default().push(bounds);
            // A child has promises of its own for nothing that it has from its parent.
            let inherited = private.get(&parent).is_some_and(|of| of.contains(&bounds));
            *sizes.entry(page).or_default() += match area.advice.no_reserve || inherited {
                true => present(host, bounds).unwrap_or(0),
                false => area.len(),
            };
        }
        for (line, flags) in procfs::parse_smaps(&smaps) {
            let promised = !flags.advice.no_reserve;
            if flags.huge_page != 0 && !private_anonymous(&line) {
                let path =
                    procfs::path(host, &format!("map_files/{:x}-{:x}", line.start, line.end));
                if let Ok(metadata) = fs::metadata(path) {
                    note(&mut objects, &metadata, promised);
                    if !line.shared && promised {
                        // Each page may get a copy of its own.
                        *sizes.entry(metadata.blksize()).or_default() += line.end - line.start;
                    }
                }
            }
        }
    }
    for &host in hosts {
        for metadata in memfds(host) {
            note(&mut objects, &metadata, false);
        }
    }
    for metadata in detached(hosts) {
        note(&mut objects, &metadata, true);
    }
    for (page, bytes) in objects.into_values() {
        *sizes.entry(page).or_default() += bytes;
    }
    sizes
}

fn private_anonymous(line: &MapLine) -> bool {
    !line.shared && line.name == "/anon_hugepage (deleted)"
}

/// What an object has, or is to have as a whole.
fn note(objects: &mut HashMap<(u64, u64), (u64, u64)>, metadata: &fs::Metadata, promised: bool) {
    let bytes = if promised { metadata.size() } else { metadata.blocks() * 512 };
    let known = objects.entry((metadata.dev(), metadata.ino())).or_default();
    *known = (metadata.blksize(), known.1.max(bytes));
}

/// The memfds of huge pages that a process has open.
fn memfds(host: i32) -> Vec<fs::Metadata> {
    let Ok(entries) = fs::read_dir(procfs::path(host, "fd")) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let memfds = paths.filter(|path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
    });
    let found = memfds.filter_map(|path| fs::metadata(path).ok());
    // Those of ordinary pages tell the size of a page.
    found.filter(|metadata| metadata.blksize() > ckpt_format::memory::PAGE).collect()
}

/// The segments of huge pages that nobody has attached, in the IPC namespaces of processes.
fn detached(hosts: &[i32]) -> Vec<fs::Metadata> {
    let mut seen = BTreeSet::new();
    let first = hosts.iter().filter(|&&host| seen.insert(ipc::namespace_of(host)));
    let files = first.filter_map(|&host| {
        let process = task::pidfd_open(host).ok()?;
        ipc::detached_segments(process.as_fd(), 0, 0).ok()
    });
    let files = files.flatten().filter(|(object, _)| object.kind.huge_page().is_some());
    files.filter_map(|(_, file)| file.metadata().ok()).collect()
}

/// How many bytes of an area are there.
fn present(host: i32, (start, end): (u64, u64)) -> io::Result<u64> {
    let pagemap = File::open(procfs::path(host, "pagemap"))?;
    let query = Query { any_of: category::PRESENT | category::SWAPPED, ..Query::default() };
    let mut bytes = 0;
    pagemap::scan(&pagemap, start, end, query, |start, end| bytes += end - start)?;
    Ok(bytes)
}

/// How much memory in huge pages of this size nobody has or is promised, in bytes; with what the
/// kernel would add to the pool by itself.
pub fn available(page: u64) -> u64 {
    let read = |name: &str| -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", page >> 10);
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
    let more = read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"));
    free.saturating_add(more).saturating_mul(page)
}
