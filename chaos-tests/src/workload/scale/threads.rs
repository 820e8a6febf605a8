//! A thousand threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::gettid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const THREADS: usize = 1000;
const STACK: usize = 64 << 10;

/// What the threads share.
struct Crowd {
    counters: Vec<AtomicU64>,
    stop: Mutex<bool>,
    changed: Condvar,
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let crowd = Arc::new(Crowd {
        counters: (0..THREADS).map(|_| AtomicU64::new(0)).collect(),
        stop: Mutex::new(false),
        changed: Condvar::new(),
    });
    let mut threads = Vec::new();
    for place in 0..THREADS {
        let crowd = Arc::clone(&crowd);
        let thread = std::thread::Builder::new().stack_size(STACK).name(format!("many {place}"));
        threads.push(thread.spawn(move || live(place, &crowd))?);
    }
    let mut last = vec![0; THREADS];
    let mut still = 0;
    while context.step(Duration::from_millis(100))? {
        let ended = threads.iter().position(std::thread::JoinHandle::is_finished);
        if ended.is_some() {
            break;
        }
        if context.progress.plant() {
            crowd.counters[0].store(u64::MAX, Ordering::SeqCst);
        }
        still += 1;
        if still == 100 {
            still = 0;
            for (place, (last, now)) in last.iter_mut().zip(&crowd.counters).enumerate() {
                let now = now.load(Ordering::SeqCst);
                ensure(now > *last, || format!("thread {place} stands at {now}"))?;
                *last = now;
            }
        }
    }
    *crowd.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
    crowd.changed.notify_all();
    threads.into_iter().try_for_each(|thread| {
        thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
    })
}

fn live(place: usize, crowd: &Crowd) -> Result<(), Failure> {
    let id = gettid();
    let mut stop = crowd.stop.lock().unwrap_or_else(PoisonError::into_inner);
    for count in 0.. {
        if *stop {
            return Ok(());
        }
        same("a thread's counter", crowd.counters[place].load(Ordering::SeqCst), count)?;
        same("a thread's number", gettid(), id)?;
        crowd.counters[place].store(count + 1, Ordering::SeqCst);
        let waited = crowd.changed.wait_timeout(stop, Duration::from_millis(1000));
        stop = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    Ok(())
}
