//! Threads: what each has for itself, how they wait for each other, and what their registers hold.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ckpt_engine::sys::program::registers;
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::{Pid, gettid};

use crate::workload::context::{Context, Progress};
use crate::workload::outcome::{Failure, ensure, same};

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// A ball that the threads hand round.
struct Ring {
    turn: Mutex<u64>,
    changed: Condvar,
    stop: AtomicBool,
}

const PLAYERS: u64 = 4;

type Player = JoinHandle<Result<(), Failure>>;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let ring = Arc::new(Ring {
        turn: Mutex::new(0),
        changed: Condvar::new(),
        stop: AtomicBool::new(false),
    });
    let mut threads: Vec<Player> = Vec::new();
    for player in 0..PLAYERS {
        let (ring, progress) = (Arc::clone(&ring), context.progress.clone());
        let thread = std::thread::Builder::new().name(format!("player {player}"));
        threads.push(thread.spawn(move || play(player, &ring, &progress))?);
    }
    let (pinned, progress) = (Arc::clone(&ring), context.progress.clone());
    threads.push(std::thread::spawn(move || follow_processor(&pinned.stop, &progress)));
    let mut last = 0;
    let mut still = 0;
    while context.step(Duration::from_millis(20))? {
        let turn = *ring.turn.lock().unwrap_or_else(PoisonError::into_inner);
        still = if turn == last { still + 1 } else { 0 };
        last = turn;
        ensure(still < 500, || format!("the ball has not moved since turn {turn}"))?;
        if threads.iter().any(JoinHandle::is_finished) {
            break;
        }
        let count = std::fs::read_dir("/proc/self/task")?.count();
        same("threads of the process", count, threads.len() + 1)?;
    }
    ring.stop.store(true, Ordering::SeqCst);
    ring.changed.notify_all();
    join(threads)
}

fn play(player: u64, ring: &Ring, progress: &Progress) -> Result<(), Failure> {
    let id = gettid();
    OWN.set(player << 32);
    let mut turn = ring.turn.lock().unwrap_or_else(PoisonError::into_inner);
    for count in 0u64.. {
        while *turn % PLAYERS != player && !ring.stop.load(Ordering::SeqCst) {
            turn = ring.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        if ring.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        same("turns seen by a player", *turn / PLAYERS, count)?;
        same("thread-local value", OWN.get(), player << 32 | count)?;
        same("thread id", gettid(), id)?;
        OWN.set(player << 32 | (count + 1));
        progress.count();
        if progress.plant() {
            OWN.set(0);
        }
        *turn += 1;
        ring.changed.notify_all();
        // Off the processor for a moment, so that the others are found waiting.
        drop(turn);
        std::thread::sleep(Duration::from_micros(500));
        turn = ring.turn.lock().unwrap_or_else(PoisonError::into_inner);
    }
    Ok(())
}

/// Runs on one processor after the other. The C library takes the number from restartable
/// sequences, so it is only right while their area is registered with the kernel.
fn follow_processor(stop: &AtomicBool, progress: &Progress) -> Result<(), Failure> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let processors: Vec<usize> =
        (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    for cpu in processors.iter().cycle() {
        if stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut one = CpuSet::new();
        one.set(*cpu)?;
        sched_setaffinity(this, &one)?;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(1));
            same("the processor that this thread is bound to", sched_getcpu()?, *cpu)?;
        }
        progress.count();
    }
    Ok(())
}

/// Registers of every kind in the middle of a loop, on several threads.
pub(super) fn registers(context: &mut Context) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let planted = Arc::new(AtomicU64::new(0));
    let mut threads: Vec<Player> = Vec::new();
    for number in 0..3u64 {
        let (stop, planted) = (Arc::clone(&stop), Arc::clone(&planted));
        let progress = context.progress.clone();
        threads.push(std::thread::spawn(move || {
            for seed in number.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                // About five milliseconds at a time, then a rest for the others.
                let held = registers::hold(seed, 10_000_000) && planted.load(Ordering::SeqCst) == 0;
                ensure(held, || "registers changed in the middle of a loop".to_owned())?;
                progress.count();
                std::thread::sleep(Duration::from_millis(30));
            }
            Ok(())
        }));
    }
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            planted.store(1, Ordering::SeqCst);
        }
        if threads.iter().any(JoinHandle::is_finished) {
            break;
        }
    }
    stop.store(true, Ordering::SeqCst);
    join(threads)
}

/// Waits for threads and passes on the first failure.
fn join(threads: Vec<Player>) -> Result<(), Failure> {
    let mut result = Ok(());
    for thread in threads {
        let ended = thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")));
        result = result.and(ended);
    }
    result
}
