//! A target that is told of repetitions has the same as one that is sent all.

use std::collections::BTreeMap;

use ckpt_format::{memory::Advice, process::Shape};
use proptest::prelude::*;

use super::*;
use crate::areas::testing::anonymous;

const BASE: u64 = 0x7000_0000_0000;
const KEY: PageKey = [7; 32];

/// A target as far as memory goes. It does what a skeleton does.
#[derive(Clone, Debug, Default, PartialEq)]
struct Target {
    processes: BTreeMap<i32, Process>,
    shared: BTreeMap<(u64, u64), u8>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Process {
    life: u64,
    next_life: u64,
    areas: Vec<Area>,
    pages: BTreeMap<u64, u8>,
}

fn starts(runs: &[Run]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| (run.start..run.end()).step_by(PAGE as usize))
}

impl Target {
    fn put(&mut self, space: Space, start: u64, byte: Option<u8>) {
        match (space, byte) {
            (Space::Process(pid), Some(byte)) => {
                self.processes.get_mut(&pid).unwrap().pages.insert(start, byte);
            }
            (Space::Process(pid), None) => {
                self.processes.get_mut(&pid).unwrap().pages.remove(&start);
            }
            (Space::Shared(id), Some(byte)) => drop(self.shared.insert((id, start), byte)),
            (Space::Shared(id), None) => drop(self.shared.remove(&(id, start))),
        }
    }

    fn apply(&mut self, record: &Record) {
        match record {
            Record::Layout(layout) => {
                let there = |pid: &i32| layout.processes.iter().any(|shape| shape.pid == *pid);
                self.processes.retain(|pid, _| there(pid));
                for shape in &layout.processes {
                    if !self.processes.contains_key(&shape.pid) {
                        let parent = self.processes.get(&shape.parent).filter(|_| shape.heir);
                        let mut born = parent.cloned().unwrap_or_default();
                        born.life = if shape.heir { shape.life } else { 0 };
                        self.processes.insert(shape.pid, born);
                    }
                    self.processes.get_mut(&shape.pid).unwrap().next_life = shape.life;
                }
            }
            Record::Areas { pid, areas, complete } => {
                assert!(complete);
                let process = self.processes.get_mut(pid).unwrap();
                let good = match process.life == process.next_life {
                    true => kept(&process.areas, areas),
                    false => crate::ranges::Ranges::default(),
                };
                process.pages.retain(|&start, _| good.covers(start, start + PAGE));
                process.life = process.next_life;
                process.areas.clone_from(areas);
            }
            Record::Pages { space, runs, data } => {
                for (start, page) in starts(runs).zip(data.chunks_exact(PAGE as usize)) {
                    self.put(*space, start, Some(page[0]));
                }
            }
            Record::Same { space, runs, origins, key, hashes } => {
                let places = origins.iter().flat_map(|it| {
                    let pages = &self.processes[&it.pid].pages;
                    starts(std::slice::from_ref(&it.run)).map(|start| pages[&start])
                });
                let bytes: Vec<u8> = places.collect();
                assert_eq!(bytes.len(), hashes.len());
                for ((start, byte), hash) in starts(runs).zip(bytes).zip(hashes) {
                    assert_eq!(page_hash(key, &page(byte)), *hash);
                    self.put(*space, start, Some(byte));
                }
            }
            Record::Drop { space, runs } => {
                starts(runs).for_each(|start| self.put(*space, start, None));
            }
            Record::Guards { .. } => {}
        }
    }
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

fn run(first: u64, pages: u64) -> Run {
    Run { start: BASE + first * PAGE, pages }
}

fn shape(pid: i32, life: u64) -> Shape {
    Shape { pid, life, parent: 1, ..Shape::default() }
}

fn layout(lives: &[(i32, u64)]) -> Record {
    let processes = lives.iter().map(|&(pid, life)| shape(pid, life)).collect();
    Record::Layout(Layout { processes, shared: Vec::new() })
}

fn part(first: u64, end: u64) -> Area {
    anonymous(BASE + first * PAGE, BASE + end * PAGE)
}

fn areas(pid: i32, areas: Vec<Area>) -> Record {
    Record::Areas { pid, areas, complete: true }
}

fn pages(space: Space, first: u64, bytes: &[u8]) -> Record {
    let data = bytes.iter().flat_map(|&byte| page(byte)).collect::<Vec<u8>>().into();
    Record::Pages { space, runs: vec![run(first, bytes.len() as u64)], data }
}

fn of(pid: i32, first: u64, bytes: &[u8]) -> Record {
    pages(Space::Process(pid), first, bytes)
}

/// Both ends of a stream, and what the target would be without repetitions.
struct Both {
    repeats: Repeats,
    told: Target,
    whole: Target,
    sent: usize,
}

impl Both {
    /// With two processes that have eight pages each.
    fn new() -> Self {
        let (told, whole) = (Target::default(), Target::default());
        let mut both = Self { repeats: Repeats::new(KEY), told, whole, sent: 0 };
        both.send(layout(&[(1, 1), (2, 2)]));
        both.send(areas(1, vec![part(0, 8)]));
        both.send(areas(2, vec![part(0, 8)]));
        both
    }

    /// Returns how many pages were sent for the record, and how many were found.
    fn send_with(&mut self, record: Record, look: Look) -> (usize, u64) {
        self.whole.apply(&record);
        let shortened = self.repeats.shorten(record, look);
        let mut sent = 0;
        for record in &shortened.records {
            self.told.apply(record);
            if let Record::Pages { data, .. } = record {
                sent += data.len() / PAGE as usize;
            }
        }
        assert_eq!(self.told, self.whole);
        self.sent += sent;
        (sent, shortened.found)
    }

    fn send(&mut self, record: Record) -> (usize, u64) {
        self.send_with(record, Look::All)
    }
}

#[test]
fn what_another_process_has_is_not_sent() {
    let mut both = Both::new();
    assert_eq!(both.send(of(1, 0, &[1, 2, 3, 3])), (3, 1));
    assert_eq!(both.send(of(2, 4, &[3, 2, 9, 1])), (1, 3));
    assert_eq!(both.send(pages(Space::Shared(5), 0, &[9, 9, 2])), (0, 3));
    // Also what is written once more as it was.
    assert_eq!(both.send(of(1, 0, &[1, 2])), (0, 2));
}

/// What takes the contents of page 0 of process 1 away.
#[test]
fn a_place_that_has_lost_its_contents_is_not_referred_to() {
    let file = Backing::File { path: "/a".to_owned(), inode: 1 };
    let droppable = Advice { droppable: true, ..Advice::default() };
    let losses: Vec<Vec<Record>> = vec![
        vec![of(1, 0, &[8])],
        vec![Record::Drop { space: Space::Process(1), runs: vec![run(0, 1)] }],
        vec![Record::Guards { pid: 1, runs: vec![run(0, 3)] }],
        // Unmapped, and mapped again.
        vec![areas(1, vec![part(1, 8)])],
        vec![areas(1, vec![part(1, 8)]), areas(1, vec![part(0, 8)])],
        vec![areas(1, vec![Area { backing: file, ..part(0, 8) }])],
        vec![areas(1, vec![Area { shared: true, ..part(0, 8) }])],
        vec![areas(1, vec![Area { advice: droppable, ..part(0, 8) }])],
        // The larger part stays.
        vec![areas(1, vec![part(0, 2), part(2, 8)]), areas(1, vec![part(0, 8)])],
        // Another program, the end, and another process of that number.
        vec![layout(&[(1, 3), (2, 2)])],
        vec![layout(&[(1, 3), (2, 2)]), areas(1, vec![part(0, 8)])],
        vec![layout(&[(2, 2)])],
        vec![layout(&[(2, 2)]), layout(&[(1, 1), (2, 2)]), areas(1, vec![part(0, 8)])],
        vec![Record::Same {
            space: Space::Process(1),
            runs: vec![run(0, 1)],
            origins: vec![Origin { pid: 2, run: run(7, 1) }],
            key: KEY,
            hashes: vec![page_hash(&KEY, &page(6))],
        }],
    ];
    for loss in losses {
        let mut both = Both::new();
        both.send(of(2, 7, &[6]));
        assert_eq!(both.send(of(1, 0, &[5])), (1, 0));
        assert_eq!(both.send(of(2, 1, &[5])), (0, 1));
        let told = format!("{loss:?}");
        for record in loss {
            both.send(record);
        }
        assert_eq!(both.send(of(2, 0, &[5])), (1, 0), "{told}");
    }
}

#[test]
fn what_takes_nothing_away_leaves_all_known() {
    let harmless = [
        layout(&[(1, 1), (2, 2)]),
        areas(1, vec![part(0, 8), part(9, 12)]),
        areas(1, vec![part(0, 4)]),
        areas(2, vec![]),
        layout(&[(1, 1)]),
        of(1, 1, &[7, 7]),
        Record::Drop { space: Space::Process(1), runs: vec![run(1, 2)] },
        Record::Drop { space: Space::Shared(1), runs: vec![run(0, 1)] },
        pages(Space::Shared(1), 0, &[9]),
        Record::Guards { pid: 1, runs: vec![run(3, 1)] },
    ];
    for record in harmless {
        let mut both = Both::new();
        both.send(of(1, 0, &[5]));
        let told = format!("{record:?}");
        both.send(record);
        assert_eq!(both.send(of(1, 3, &[5])), (0, 1), "{told}");
    }
}

#[test]
fn only_private_anonymous_memory_is_referred_to() {
    let mut both = Both::new();
    let file = Backing::File { path: "/a".to_owned(), inode: 1 };
    let huge = Backing::Huge { page: 2 << 20 };
    let droppable = Advice { droppable: true, ..Advice::default() };
    let others = vec![
        Area { backing: file, ..part(0, 1) },
        Area { backing: huge, ..part(1, 2) },
        Area { advice: droppable, ..part(2, 3) },
        Area { shared: true, ..part(3, 4) },
    ];
    both.send(areas(1, others));
    both.send(pages(Space::Shared(1), 0, &[5]));
    for place in 0..5 {
        assert_eq!(both.send(of(1, place, &[5])), (1, 0), "{place}");
    }
}

#[test]
fn pages_in_no_order_are_sent_as_they_are() {
    let mut both = Both::new();
    both.send(of(1, 0, &[5]));
    let data: Vec<u8> = [5, 6, 5].into_iter().flat_map(page).collect();
    let runs = vec![run(4, 1), run(4, 1), run(5, 1)];
    let twice = Record::Pages { space: Space::Process(1), runs, data: data.into() };
    assert_eq!(both.send(twice), (3, 0));
}

#[test]
fn of_what_is_alike_all_is_in_the_sample_or_nothing() {
    let mut both = Both::new();
    let mut sent = 0;
    for byte in 1..=255 {
        let alone = both.send_with(of(1, 0, &[byte]), Look::Sample);
        let (first, again) = (alone.0, both.send_with(of(2, 0, &[byte]), Look::Sample));
        assert_eq!(first, 1);
        sent += again.0;
    }
    assert!((200..=250).contains(&sent), "{sent}");
}

fn any_areas() -> impl Strategy<Value = Vec<Area>> {
    let file = |from, to| {
        let backing = Backing::File { path: "/a".to_owned(), inode: 1 };
        Area { backing, ..part(from, to) }
    };
    let droppable = Advice { droppable: true, ..Advice::default() };
    prop::sample::select(vec![
        vec![part(0, 8)],
        vec![part(0, 4)],
        vec![part(2, 8)],
        vec![part(0, 3), part(3, 8)],
        vec![file(0, 4), part(4, 8)],
        vec![part(0, 4), Area { advice: droppable, ..part(4, 8) }],
        vec![],
    ])
}

fn any_record() -> impl Strategy<Value = Record> {
    let pid = 1..4i32;
    let space = prop_oneof![
        4 => (1..4i32).prop_map(Space::Process),
        1 => (1..3u64).prop_map(Space::Shared),
    ];
    let bytes = prop::collection::vec(1..6u8, 1..5);
    let living = prop::collection::vec((any::<bool>(), 1..3u64, any::<bool>()), 3);
    prop_oneof![
        8 => (space.clone(), 0..5u64, bytes).prop_map(|(space, at, bytes)| pages(space, at, &bytes)),
        2 => (space, 0..8u64, 1..4u64)
            .prop_map(|(space, at, count)| Record::Drop { space, runs: vec![run(at, count)] }),
        2 => (pid.clone(), any_areas()).prop_map(|(pid, list)| areas(pid, list)),
        1 => (pid, 0..8u64).prop_map(|(pid, at)| Record::Guards { pid, runs: vec![run(at, 1)] }),
        1 => living.prop_map(|living| {
            let there = (1..).zip(living).filter(|(pid, (there, ..))| *there || *pid == 1);
            let shapes = there.map(|(pid, (_, life, heir))| {
                Shape { heir: heir && pid > 1, ..shape(pid, life) }
            });
            Record::Layout(Layout { processes: shapes.collect(), shared: Vec::new() })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_target_has_the_same_as_if_all_were_sent(
        records in prop::collection::vec((any_record(), any::<bool>()), 1..60)
    ) {
        let mut both = Both::new();
        for (record, all) in records {
            let known = match &record {
                Record::Pages { space: Space::Process(pid), .. }
                | Record::Drop { space: Space::Process(pid), .. }
                | Record::Areas { pid, .. } => both.whole.processes.contains_key(pid),
                _ => true,
            };
            if known {
                both.send_with(record, if all { Look::All } else { Look::Sample });
            }
        }
    }
}
