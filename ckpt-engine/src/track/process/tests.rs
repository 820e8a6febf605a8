//! Tests of what is tracked in one process.

use super::*;
use crate::{
    areas::testing::anonymous,
    sys::{testing::call, userfault},
};

fn map(address: u64, pages: u64) -> u64 {
    let (protection, flags) = (3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let arguments = [address, pages * PAGE, protection, (flags | fixed) as u64, u64::MAX, 0];
    call(libc::SYS_mmap, arguments).unwrap()
}

fn area(start: u64, pages: u64) -> Area {
    anonymous(start, start + pages * PAGE)
}

/// One round over these areas: what is due.
fn round(life: &mut Life, areas: Vec<Area>) -> Ranges {
    life.space.areas = areas;
    life.register_new();
    let mut due = Ranges::default();
    for area in &life.space.areas {
        life.scan(area, &mut due).unwrap();
    }
    life.anew = Ranges::default();
    due
}

#[test]
fn an_area_that_lost_its_tracking_by_a_move_beside_it_counts_as_written() {
    let own = std::process::id().cast_signed();
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | userfault::USER_MODE_ONLY;
    let fd = call(libc::SYS_userfaultfd, [flags as u64, 0, 0, 0, 0, 0]).unwrap();
    let fetched = task::pidfd_getfd(&task::pidfd_open(own).unwrap(), fd as i32).unwrap();
    call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]).unwrap();
    let (mut life, _) = Life::open(own, 1).unwrap();
    life.tracking = Some(Tracking::new(fetched).unwrap());
    let room = map(0, 64);
    call(libc::SYS_munmap, [room, 64 * PAGE, 0, 0, 0, 0]).unwrap();
    let untouched = map(room, 4);
    let used = map(room + 32 * PAGE, 8);
    let third = used + 3 * PAGE;
    let write = |life: &Life| life.memory.write_all_at(&[1; 8], third).unwrap();
    for page in 0..8 {
        life.memory.write_all_at(&[1], used + page * PAGE).unwrap();
    }
    let areas = vec![area(untouched, 4), area(used, 8)];
    assert!(round(&mut life, areas.clone()).iter().eq([(used, used + 8 * PAGE)]));
    assert!(round(&mut life, areas.clone()).is_empty());

    // The kernel joins the moved area with its new neighbour, and takes the registration of
    // both away, but not the marks.
    let beside = used - 8 * PAGE;
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let moved = [untouched, 4 * PAGE, 8 * PAGE, how, beside, 0];
    assert_eq!(call(libc::SYS_mremap, moved).unwrap(), beside);
    write(&life);
    let areas = vec![area(beside, 16)];
    let due = round(&mut life, areas.clone());
    assert!(due.iter().any(|(start, end)| start <= third && third < end));
    assert!(round(&mut life, areas.clone()).is_empty());
    write(&life);
    assert!(round(&mut life, areas).iter().eq([(third, third + PAGE)]));
    call(libc::SYS_munmap, [beside, 16 * PAGE, 0, 0, 0, 0]).unwrap();
}

#[test]
fn a_mapped_file_that_loses_its_name_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut child = std::process::Command::new(&program).arg("100").spawn().unwrap();
    let mut tracked = Tracked::new(child.id().cast_signed(), 1, 0);
    // As if nothing ever changed its areas.
    let mark = Some(AreasMark { memory: 1, locked: 1, executed: 1 });
    let named = |tracked: &mut Tracked| {
        tracked.refresh(&mut 0, None, mark).unwrap();
        let is_it = |area: &Area| match &area.backing {
            Backing::File { path, .. } => path.ends_with("/program"),
            _ => false,
        };
        tracked.space().areas.iter().any(is_it)
    };
    // The program is there a moment after the process.
    let start = std::time::Instant::now();
    tracked.namespaces = Some(Namespaces::default());
    // Asleep, with all its libraries.
    let is_ready = |tracked: &mut Tracked| {
        named(tracked)
            && procfs::Stat::read(tracked.host()).unwrap().state == 'S'
            && tracked.names_if(mark).is_some()
            && tracked.has_same_names()
    };
    while !is_ready(&mut tracked) && start.elapsed().as_secs() < 10 {
        std::thread::yield_now();
    }
    let found = (named(&mut tracked), tracked.names_if(mark), tracked.has_same_names());
    let other = tracked.names_if(Some(AreasMark { memory: 1, locked: 2, executed: 1 }));
    let removed = std::fs::remove_file(&program);
    let (same, still) = (tracked.has_same_names(), named(&mut tracked));
    child.kill().unwrap();
    child.wait().unwrap();
    removed.unwrap();
    assert!(found.0 && found.2, "it is there");
    assert!(
        found.1.unwrap().contains("/program") && other.is_none(),
        "only if nothing has changed"
    );
    assert!(!same && !still, "it is gone");
}

#[test]
fn a_process_is_in_place_as_long_as_the_kernel_says_the_same() {
    let mut tracked = Tracked::new(1, 1, 0);
    tracked.compare_places(Some([1; 9]));
    assert!(!tracked.is_in_place(), "nobody has looked at its namespaces");
    tracked.places = Some([1; 9]);
    tracked.compare_places(Some([1; 9]));
    assert!(tracked.is_in_place());
    let mut another = [1; 9];
    another[8] = 2;
    for says in [Some(another), None] {
        tracked.compare_places(says);
        assert!(!tracked.is_in_place(), "{says:?}");
        tracked.compare_places(Some([1; 9]));
    }
}
