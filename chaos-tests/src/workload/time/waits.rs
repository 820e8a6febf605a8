//! Waits with a timeout, several kinds at once. None may be interrupted, end early, or never end.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ckpt_engine::sys::program::futex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::select::{FdSet, select};
use nix::sys::time::{TimeSpec, TimeVal};
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure};

/// One wait of about this long; an error is a failure of the kernel's promise.
type Wait = fn(Duration) -> Result<(), Failure>;

const WAITS: [(&str, Wait); 6] = [
    ("nanosleep", sleep_relative),
    ("clock_nanosleep", sleep_absolute),
    ("poll", wait_poll),
    ("epoll_wait", wait_epoll),
    ("select", wait_select),
    ("futex", wait_futex),
];

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for (name, wait) in WAITS {
        let (stop, progress) = (Arc::clone(&stop), context.progress.clone());
        threads.push(std::thread::spawn(move || -> Result<(), Failure> {
            for turn in 0u64.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let asked = Duration::from_millis(1 + mix(turn) % 1500);
                let began = Instant::now();
                wait(asked)?;
                let mut took = began.elapsed();
                if progress.plant() {
                    took = Duration::ZERO;
                }
                ensure(took + Duration::from_millis(1) >= asked, || {
                    format!("{name} of {asked:?} ended after {took:?}")
                })?;
                ensure(took < asked + LATE, || format!("{name} of {asked:?} took {took:?}"))?;
                progress.count();
            }
            Ok(())
        }));
    }
    while context.step(Duration::from_millis(50))? {
        if threads.iter().any(std::thread::JoinHandle::is_finished) {
            break;
        }
    }
    stop.store(true, Ordering::SeqCst);
    let mut result = Ok(());
    for thread in threads {
        let ended = thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")));
        result = result.and(ended);
    }
    result
}

fn sleep_relative(time: Duration) -> Result<(), Failure> {
    let flags = ClockNanosleepFlags::empty();
    clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &TimeSpec::from_duration(time))?;
    Ok(())
}

fn sleep_absolute(time: Duration) -> Result<(), Failure> {
    let now = Duration::from(nix::time::clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let flags = ClockNanosleepFlags::TIMER_ABSTIME;
    clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &TimeSpec::from_duration(now + time))?;
    Ok(())
}

fn wait_poll(time: Duration) -> Result<(), Failure> {
    let (read, _write) = std::io::pipe()?;
    let mut fds = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(time).map_err(|_| Failure::new("too long"))?;
    ensure(poll(&mut fds, timeout)? == 0, || "poll saw data in an empty pipe".to_owned())
}

fn wait_epoll(time: Duration) -> Result<(), Failure> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let timeout = EpollTimeout::try_from(time).map_err(|_| Failure::new("too long"))?;
    let found = epoll.wait(&mut [EpollEvent::empty()], timeout)?;
    ensure(found == 0, || "an empty epoll saw an event".to_owned())
}

fn wait_select(time: Duration) -> Result<(), Failure> {
    let (read, _write) = std::io::pipe()?;
    let mut set = FdSet::new();
    set.insert(read.as_fd());
    let micros = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    let mut timeout = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
    let found = select(None, &mut set, None, None, &mut timeout)?;
    ensure(found == 0, || "select saw data in an empty pipe".to_owned())
}

fn wait_futex(time: Duration) -> Result<(), Failure> {
    let word = AtomicU32::new(1);
    let ended = futex::wait(&word, 1, time).err().and_then(|error| error.raw_os_error());
    ensure(ended == Some(libc::ETIMEDOUT), || format!("a futex wait ended with {ended:?}"))
}
