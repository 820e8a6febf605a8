//! Processes are rebuilt.

use std::{collections::BTreeMap, os::unix::fs::FileExt};

use crate::bench::{Bench, ID_BASE, seed};
use ckpt_engine::{areas::kept, container::Container, procfs, rebuild::Skeleton};
use ckpt_format::{
    container::Container as Plan,
    memory::{Advice, Area, Backing, PAGE, Run, Space},
    process::{Layout, Shape},
    stream::{Origin, PageKey, Record, page_hash},
};

const BASE: u64 = 0x7000_0000_0000;
const PAGES: u64 = 64;

fn init() -> Shape {
    Shape { pid: 1, life: 1, group: 1, session: 1, ..Shape::default() }
}

fn layout(processes: Vec<Shape>) -> Record {
    Record::Layout(Layout { processes, shared: Vec::new() })
}

/// Gives the only process of a skeleton these areas.
fn lay_out(skeleton: &mut Skeleton, areas: Vec<Area>) {
    skeleton.apply(layout(vec![init()])).expect("a layout");
    skeleton.apply(Record::Areas { pid: 1, areas, complete: true }).expect("areas");
}

fn area(from: u64, to: u64) -> Area {
    Area {
        start: BASE + from * PAGE,
        end: BASE + to * PAGE,
        protection: 3,
        shared: false,
        grows_down: false,
        may_write: true,
        offset: 0,
        backing: Backing::Anonymous { name: None },
        advice: Advice::default(),
    }
}

fn page(at: u64, byte: u8) -> Record {
    let runs = vec![Run { start: BASE + at * PAGE, pages: 1 }];
    Record::Pages { space: Space::Process(1), runs, data: vec![byte; PAGE as usize].into() }
}

/// A skeleton of one process, and the number of that on the host.
fn skeleton(bench: &Bench) -> (Container, Skeleton) {
    let container = Container::create(&bench.spec(Plan::fresh("ve")), seed()).expect("create");
    let channel = container.channel.try_clone().expect("a channel");
    let skeleton = Skeleton::adopt(container.init, channel, ID_BASE).expect("adopt");
    (container, skeleton)
}

/// Every area must lie in one of the kernel's: a program moves and resizes it as a whole.
fn assert_whole(init: i32, areas: &[Area], what: &str) {
    let maps = procfs::read_text(init, "maps").expect("maps");
    let lines = procfs::parse_maps(&maps);
    for area in areas {
        let whole = lines.iter().any(|line| {
            line.start <= area.start && area.end <= line.end && line.protection == area.protection
        });
        assert!(whole, "{what}: {:x}-{:x} in {maps}", area.start, area.end);
    }
}

#[test]
fn an_area_that_grows_between_others_is_one_area() {
    let bench = Bench::new();
    let (container, mut skeleton) = skeleton(&bench);
    lay_out(&mut skeleton, vec![area(0, 4), area(8, 12), area(16, 20)]);
    for at in [0, 8, 16] {
        skeleton.apply(page(at, 1)).unwrap();
    }
    // The kernel of the source did not join these, because each had its own pages.
    let areas = vec![area(0, 6), area(6, 14), area(14, 20)];
    lay_out(&mut skeleton, areas.clone());
    assert_whole(container.init, &areas, "grown");
    drop((skeleton, container));
}

#[test]
fn what_is_open_below_a_dead_process_can_be_opened_again() {
    use std::{io::Read, os::fd::AsFd};

    use ckpt_format::{
        files::{File, FileId, Files, Kind, PathFile},
        process::Processes,
    };

    let bench = Bench::new();
    let container = Container::create(&bench.spec(Plan::fresh("ve")), seed()).unwrap();
    let (init_host, channel) = (container.init, container.channel.try_clone().unwrap());
    // What a thread traces ends with it, and only then can the container go.
    let work = || {
        let mut skeleton = Skeleton::adopt(init_host, channel, ID_BASE).unwrap();
        let dead = Shape { pid: 7, parent: 1, exit_signal: 17, zombie: Some(42 << 8), ..init() };
        skeleton.apply(layout(vec![init(), dead])).unwrap();
        let path = PathFile {
            path: b"/proc/7/stat".to_vec(),
            offset: 0,
            file_type: libc::S_IFREG,
            device: 0,
            trigger: false,
            process_gone: false,
        };
        let kind = Kind::Path(path);
        let (signal, locks, lease) = (0, Vec::new(), None);
        let file = File {
            flags: 0,
            owner: None,
            signal,
            locks,
            lease,
            write_hint: 0,
            mounts: 0,
            network: 0,
            kind,
        };
        let files = Files { files: vec![file], ..Files::default() };
        skeleton.populate(&Processes::default(), &BTreeMap::default()).unwrap();
        let opened = skeleton.open_files(&files).unwrap();
        let stat = opened.descriptor(FileId(0)).unwrap().as_fd().try_clone_to_owned().unwrap();
        let mut text = String::new();
        std::fs::File::from(stat).read_to_string(&mut text).unwrap();
        assert!(text.contains(") t "), "{text}");
    };
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap();
}

/// Pages `to` get what stands in pages `from`, which is said to be pages of these bytes.
fn same(to: &[u64], from: &[u64], bytes: &[u8]) -> Record {
    const KEY: PageKey = [9; 32];
    let run = |at: &u64| Run { start: BASE + at * PAGE, pages: 1 };
    let hash = |&byte: &u8| page_hash(&KEY, &vec![byte; PAGE as usize]);
    Record::Same {
        space: Space::Process(1),
        runs: to.iter().map(run).collect(),
        origins: from.iter().map(|at| Origin { pid: 1, run: run(at) }).collect(),
        key: KEY,
        hashes: bytes.iter().map(hash).collect(),
    }
}

#[test]
fn pages_are_taken_from_where_they_stand() {
    let bench = Bench::new();
    let (container, mut skeleton) = skeleton(&bench);
    lay_out(&mut skeleton, vec![area(0, PAGES)]);
    for at in 0..3 {
        skeleton.apply(page(at, 7 + at as u8)).expect("a page");
    }
    // All is read before any of it is written.
    skeleton.apply(same(&[1, 2, 9], &[2, 1, 0], &[9, 8, 7])).expect("the same pages");
    let memory = std::fs::File::open(procfs::path(container.init, "mem")).expect("memory");
    for (at, byte) in [(0, 7), (1, 9), (2, 8), (9, 7)] {
        let mut found = vec![0; PAGE as usize];
        memory.read_exact_at(&mut found, BASE + at * PAGE).expect("a page");
        assert!(found.iter().all(|&it| it == byte), "page {at}");
    }
    // A source that is wrong about what stands there, or tells no sense, ends the move.
    let outside = 1 << 40;
    for wrong in [
        same(&[3], &[0], &[8]),
        same(&[3], &[20], &[7]),
        same(&[3], &[outside], &[7]),
        same(&[3, 4], &[0], &[7]),
        same(&[3], &[0, 0], &[7, 7]),
        same(&[3], &[0], &[7, 7]),
        Record::Same {
            space: Space::Process(1),
            runs: Vec::new(),
            origins: vec![Origin { pid: 1, run: Run { start: 0, pages: u64::MAX } }; 2],
            key: [0; 32],
            hashes: Vec::new(),
        },
    ] {
        let told = format!("{wrong:?}");
        assert!(skeleton.apply(wrong).is_err(), "{told}");
    }
    drop((skeleton, container));
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % limit
    }
}

fn some_areas(dice: &mut Dice) -> Vec<Area> {
    let mut areas = Vec::new();
    let mut at = dice.below(6);
    while at < PAGES {
        let to = (at + 1 + dice.below(12)).min(PAGES);
        let mut area = area(at, to);
        area.advice.dont_dump = dice.below(5) == 0;
        area.advice.dont_fork = dice.below(5) == 0;
        areas.push(area);
        at = to + if dice.below(2) == 0 { 0 } else { dice.below(5) };
    }
    areas
}

#[test]
fn whatever_changes_every_area_stays_whole_and_keeps_its_pages() {
    let bench = Bench::new();
    let (container, mut skeleton) = skeleton(&bench);
    let mut dice = Dice(42);
    let mut before: Vec<Area> = Vec::new();
    let mut bytes: BTreeMap<u64, u8> = BTreeMap::new();
    for turn in 0..300 {
        let areas = some_areas(&mut dice);
        let stays = kept(&before, &areas);
        bytes.retain(|at, _| {
            let address = BASE + at * PAGE;
            stays.iter().any(|(start, end)| start <= address && address < end)
        });
        lay_out(&mut skeleton, areas.clone());
        assert_whole(container.init, &areas, &format!("turn {turn}"));
        for _ in 0..10 {
            let at = dice.below(PAGES);
            let address = BASE + at * PAGE;
            if areas.iter().any(|area| area.start <= address && address < area.end) {
                let byte = dice.below(255) as u8 + 1;
                skeleton.apply(page(at, byte)).unwrap();
                bytes.insert(at, byte);
            }
        }
        let memory = ckpt_engine::inject::memory(container.init).unwrap();
        for area in &areas {
            for at in (area.start - BASE) / PAGE..(area.end - BASE) / PAGE {
                let mut found = [0; 1];
                memory.read_exact_at(&mut found, BASE + at * PAGE).unwrap();
                assert_eq!(found[0], bytes.get(&at).copied().unwrap_or(0), "turn {turn}, {at}");
            }
        }
        before = areas;
    }
    drop((skeleton, container));
}
