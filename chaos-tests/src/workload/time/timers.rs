//! Timers of every kind against the clocks, and clocks that never go back.

use std::time::Duration;

use ckpt_engine::sys::program::signal;
use nix::errno::Errno;
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::Timer;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{self, ClockId as FdClock, TimerFd, TimerFlags};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::read;

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure};

const INTERVAL: Duration = Duration::from_millis(50);

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    context.has_handlers = true;
    let mut clocks = Clocks::new()?;
    let mut interval = IntervalTimer::start()?;
    let mut posix = PosixTimer::start()?;
    let periodic = PeriodicFd::start()?;
    let mut absolute = AbsoluteFd::start()?;
    let mut ticks = 0;
    while context.step(Duration::from_millis(7))? {
        clocks.check()?;
        interval.check()?;
        posix.check()?;
        ticks = periodic.check(ticks)?;
        absolute.check()?;
        if context.progress.plant() {
            signal::set_interval_timer(Duration::ZERO)?;
            clocks.last[0] += Duration::from_secs(100);
        }
    }
    Ok(())
}

fn now(clock: ClockId) -> Result<Duration, Failure> {
    Ok(Duration::from(clock_gettime(clock)?))
}

fn monotonic() -> Result<Duration, Failure> {
    now(ClockId::CLOCK_MONOTONIC)
}

const CLOCKS: [ClockId; 5] = [
    ClockId::CLOCK_MONOTONIC,
    ClockId::CLOCK_BOOTTIME,
    ClockId::CLOCK_MONOTONIC_RAW,
    ClockId::CLOCK_MONOTONIC_COARSE,
    ClockId::CLOCK_PROCESS_CPUTIME_ID,
];

struct Clocks {
    last: [Duration; CLOCKS.len()],
}

impl Clocks {
    fn new() -> Result<Self, Failure> {
        let mut clocks = Self { last: [Duration::ZERO; CLOCKS.len()] };
        clocks.check()?;
        Ok(clocks)
    }

    fn check(&mut self) -> Result<(), Failure> {
        for (clock, last) in CLOCKS.into_iter().zip(&mut self.last) {
            let now = now(clock)?;
            // The time a process has used cannot be carried to another host.
            if clock != ClockId::CLOCK_PROCESS_CPUTIME_ID {
                ensure(now >= *last, || format!("{clock:?} went back from {last:?} to {now:?}"))?;
            }
            *last = now;
        }
        Ok(())
    }
}

/// setitimer(2). Its signals merge while one is pending, so only too many and none are wrong.
struct IntervalTimer {
    start: Duration,
    seen: u64,
    seen_at: Duration,
}

impl IntervalTimer {
    fn start() -> Result<Self, Failure> {
        signal::count(Signal::SIGALRM as i32, libc::SA_RESTART)?;
        let start = monotonic()?;
        signal::set_interval_timer(INTERVAL)?;
        Ok(Self { start, seen: 0, seen_at: start })
    }

    fn check(&mut self) -> Result<(), Failure> {
        let count = signal::counted(Signal::SIGALRM as i32);
        let now = monotonic()?;
        if count > self.seen {
            (self.seen, self.seen_at) = (count, now);
        }
        let silence = now - self.seen_at;
        ensure(silence < INTERVAL + LATE, || format!("no SIGALRM for {silence:?}"))?;
        let most = (now - self.start).as_millis() / INTERVAL.as_millis() + 1;
        ensure(u128::from(count) <= most, || format!("{count} SIGALRM where {most} were due"))
    }
}

/// timer_create(2), once at a time, with another delay each time.
struct PosixTimer {
    timer: Timer,
    due: Duration,
    count: u64,
}

impl PosixTimer {
    fn start() -> Result<Self, Failure> {
        signal::count(Signal::SIGVTALRM as i32, libc::SA_RESTART)?;
        let event =
            SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGVTALRM, si_value: 77 });
        let timer = Timer::new(ClockId::CLOCK_MONOTONIC, event)?;
        let mut posix = Self { timer, due: Duration::ZERO, count: 0 };
        posix.arm()?;
        Ok(posix)
    }

    fn arm(&mut self) -> Result<(), Failure> {
        let delay = Duration::from_millis(20 + mix(self.count) % 1500);
        self.due = monotonic()? + delay;
        let expiration = timerfd::Expiration::OneShot(TimeSpec::from_duration(delay));
        self.timer.set(expiration, TimerSetTimeFlags::empty())?;
        Ok(())
    }

    fn check(&mut self) -> Result<(), Failure> {
        let count = signal::counted(Signal::SIGVTALRM as i32);
        let now = monotonic()?;
        let due = self.due;
        if count == self.count {
            return ensure(now < due + LATE, || format!("a POSIX timer is {:?} late", now - due));
        }
        ensure(count == self.count + 1, || format!("a timer fired {count} times"))?;
        ensure(now >= due, || format!("a POSIX timer fired {:?} early", due - now))?;
        self.count = count;
        self.arm()
    }
}

/// A periodic timerfd, which counts what it could not tell.
struct PeriodicFd {
    timer: TimerFd,
    start: Duration,
}

impl PeriodicFd {
    fn start() -> Result<Self, Failure> {
        let timer = TimerFd::new(FdClock::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
        let start = monotonic()?;
        let expiration = timerfd::Expiration::Interval(TimeSpec::from_duration(INTERVAL));
        timer.set(expiration, TimerSetTimeFlags::empty())?;
        Ok(Self { timer, start })
    }

    /// The ticks so far.
    fn check(&self, before: u64) -> Result<u64, Failure> {
        let total = before + expirations(&self.timer)?;
        let due = u64::try_from((monotonic()? - self.start).as_millis() / INTERVAL.as_millis())
            .unwrap_or(u64::MAX);
        ensure(total <= due, || format!("timerfd: {total} ticks where {due} were due"))?;
        let missing = INTERVAL * u32::try_from(due - total).unwrap_or(u32::MAX);
        ensure(missing < LATE, || format!("timerfd: {total} ticks where {due} were due"))?;
        Ok(total)
    }
}

/// A timerfd at an absolute time of the clock that goes on while the host sleeps.
struct AbsoluteFd {
    timer: TimerFd,
    due: Duration,
    count: u64,
}

impl AbsoluteFd {
    fn start() -> Result<Self, Failure> {
        let timer = TimerFd::new(FdClock::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK)?;
        let mut absolute = Self { timer, due: Duration::ZERO, count: 0 };
        absolute.arm()?;
        Ok(absolute)
    }

    fn arm(&mut self) -> Result<(), Failure> {
        let delay = Duration::from_millis(20 + mix(self.count ^ 5) % 1500);
        self.due = now(ClockId::CLOCK_BOOTTIME)? + delay;
        let expiration = timerfd::Expiration::OneShot(TimeSpec::from_duration(self.due));
        self.timer.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        Ok(())
    }

    fn check(&mut self) -> Result<(), Failure> {
        let fired = expirations(&self.timer)?;
        let now = now(ClockId::CLOCK_BOOTTIME)?;
        let due = self.due;
        if fired == 0 {
            return ensure(now < due + LATE, || format!("a timerfd is {:?} late", now - due));
        }
        ensure(fired == 1, || format!("a timerfd fired {fired} times"))?;
        ensure(now >= due, || format!("a timerfd fired {:?} early", due - now))?;
        self.count += 1;
        self.arm()
    }
}

fn expirations(timer: &TimerFd) -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    match read(timer, &mut bytes) {
        Ok(8) => Ok(u64::from_ne_bytes(bytes)),
        Err(Errno::EAGAIN) => Ok(0),
        other => Err(Failure::new(format!("reading a timerfd: {other:?}"))),
    }
}
