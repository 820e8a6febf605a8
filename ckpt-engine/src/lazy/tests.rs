//! Against the kernel: memory of this process, and a keeper in a thread.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread::JoinHandle,
};

use bytes::Bytes;
use ckpt_format::memory::{PAGE, Run};

use super::{Client, FromKeeper, Receiver, serve};
use crate::sys::{
    missing::Missing,
    program::map::{Backing, Map},
};

const PID: i32 = 7;
const WORDS: usize = PAGE as usize / 8;

/// A keeper, and what it thinks is the VE's first process.
struct Scene {
    socket: PathBuf,
    init: Child,
    keeper: Option<JoinHandle<std::io::Result<()>>>,
}

impl Scene {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("keeper-{}-{number}.sock", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let init = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = init.id() as i32;
        let keeper = std::thread::spawn(move || serve(&listener, pid));
        Self { socket, init, keeper: Some(keeper) }
    }

    fn connect(&self) -> (Client, Receiver) {
        let client = Client::new(UnixStream::connect(&self.socket).unwrap());
        let receiver = client.receiver().unwrap();
        (client, receiver)
    }

    fn ended(&mut self) {
        self.keeper.take().expect("it was there").join().unwrap().unwrap();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Empty memory whose faults are answered by somebody.
fn memory(pages: usize) -> (Map, OwnedFd, u64) {
    let map = Map::new(pages, Backing::Private).unwrap();
    let missing = Missing::own().unwrap();
    let start = map.address() as u64;
    missing.register(start, start + pages as u64 * PAGE).unwrap();
    (map, missing.into_descriptor(), start)
}

fn run(start: u64, first: u64, pages: u64) -> Run {
    Run { start: start + first * PAGE, pages }
}

/// What stands on a page: its number.
fn contents(base: u64, run: Run) -> Bytes {
    let pages = (run.start..run.end()).step_by(PAGE as usize);
    pages.flat_map(|at| ((at - base) / PAGE + 1).to_le_bytes().repeat(WORDS)).collect()
}

/// Answers everything until all is complete; returns how often somebody had to wait.
fn answer(client: &mut Client, receiver: &mut Receiver, base: u64) -> u64 {
    client.begin().unwrap();
    loop {
        match receiver.hear().unwrap().expect("it lives").0 {
            FromKeeper::Want { pid, run, .. } => {
                client.pages(pid, vec![run], contents(base, run)).unwrap();
            }
            FromKeeper::Complete { faults } => return faults,
            _ => {}
        }
    }
}

fn first_words(map: &Map, pages: std::ops::Range<usize>) -> Vec<u64> {
    pages.map(|page| map.word(page * WORDS).load(Ordering::Relaxed)).collect()
}

#[test]
fn who_touches_a_missing_page_waits_for_it_and_the_rest_comes_by_itself() {
    let mut scene = Scene::new();
    let (map, faults, start) = memory(600);
    let (mut client, mut receiver) = scene.connect();
    client.add(PID, vec![run(start, 300, 100), run(start, 0, 200)], &faults).unwrap();
    drop(faults);
    let waits = std::thread::scope(|scope| {
        let reader = scope.spawn(|| first_words(&map, 150..160));
        let waits = answer(&mut client, &mut receiver, start);
        assert_eq!(reader.join().unwrap(), (151..=160).collect::<Vec<_>>());
        waits
    });
    assert!(waits >= 1, "nobody had to wait");
    assert_eq!(first_words(&map, 0..200), (1..=200).collect::<Vec<_>>());
    assert_eq!(first_words(&map, 200..300), vec![0; 100]);
    assert_eq!(first_words(&map, 300..400), (301..=400).collect::<Vec<_>>());
    client.bye().unwrap();
    scene.ended();
    assert_eq!(first_words(&map, 400..600), vec![0; 200]);
}

#[test]
fn memory_that_moves_gets_its_pages_where_it_is() {
    let mut scene = Scene::new();
    let (mut map, faults, start) = memory(64);
    let (mut client, mut receiver) = scene.connect();
    client.add(PID, vec![run(start, 0, 64)], &faults).unwrap();
    drop(faults);
    // Something in its way, so that it has to move.
    let _wall = Map::new(512, Backing::Private).unwrap();
    map.resize(4096).unwrap();
    answer(&mut client, &mut receiver, start);
    assert_eq!(first_words(&map, 0..64), (1..=64).collect::<Vec<_>>());
    assert_eq!(first_words(&map, 64..100), vec![0; 36]);
    client.bye().unwrap();
    scene.ended();
}

#[test]
fn memory_that_is_given_back_stays_empty() {
    let mut scene = Scene::new();
    let (mut map, faults, start) = memory(64);
    let (mut client, mut receiver) = scene.connect();
    client.add(PID, vec![run(start, 0, 64)], &faults).unwrap();
    drop(faults);
    map.discard().unwrap();
    answer(&mut client, &mut receiver, start);
    assert_eq!(first_words(&map, 0..64), vec![0; 64]);
    client.bye().unwrap();
    scene.ended();
}

#[test]
fn another_daemon_is_asked_for_what_the_first_one_has_not_brought() {
    let mut scene = Scene::new();
    let (map, faults, start) = memory(400);
    let (mut client, mut receiver) = scene.connect();
    client.add(PID, vec![run(start, 0, 400)], &faults).unwrap();
    drop(faults);
    client.begin().unwrap();
    let mut brought = 0;
    while brought < 2 {
        if let FromKeeper::Want { run, .. } = receiver.hear().unwrap().expect("it lives").0 {
            client.pages(PID, vec![run], contents(start, run)).unwrap();
            brought += 1;
        }
    }
    client.close().unwrap();
    let (mut client, mut receiver) = scene.connect();
    answer(&mut client, &mut receiver, start);
    assert_eq!(first_words(&map, 0..400), (1..=400).collect::<Vec<_>>());
    client.bye().unwrap();
    scene.ended();
}

#[test]
fn a_keeper_ends_with_its_ve() {
    let mut scene = Scene::new();
    let (_map, faults, start) = memory(4);
    let (mut client, mut receiver) = scene.connect();
    client.add(PID, vec![run(start, 0, 4)], &faults).unwrap();
    let held = faults.as_fd().try_clone_to_owned().unwrap();
    scene.init.kill().unwrap();
    scene.ended();
    while receiver.hear().unwrap().is_some() {}
    drop((faults, held));
}
