//! Descriptors that count: eventfd of both kinds, signalfd, and a timerfd that nobody reads.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let nonblocking = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let counter = EventFd::from_value_and_flags(0, nonblocking)?;
    let tokens = EventFd::from_value_and_flags(5, nonblocking | EfdFlags::EFD_SEMAPHORE)?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let far = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?;
    let week = TimeSpec::from_duration(Duration::from_secs(7 * 24 * 3600));
    far.set(Expiration::OneShot(week), TimerSetTimeFlags::empty())?;
    let mut sum = 0;
    raise(Signal::SIGUSR1)?;
    while context.step(Duration::from_millis(6))? {
        let add = sum % 9 + 1;
        counter.write(add)?;
        sum += add;
        if sum > 500 {
            same("sum in an eventfd", counter.read()?, sum)?;
            sum = 0;
            same("an eventfd that was read", counter.read(), Err(Errno::EAGAIN))?;
        }
        same("a token", tokens.read()?, 1)?;
        tokens.write(1)?;
        let info = signals.read_signal()?;
        let found = info.map(|info| (info.ssi_signo, info.ssi_pid));
        let own = u32::try_from(getpid().as_raw()).unwrap_or(0);
        same("a signal in a signalfd", found, Some((Signal::SIGUSR1 as u32, own)))?;
        raise(Signal::SIGUSR1)?;
        let left = far.get()?;
        let armed = matches!(left, Some(Expiration::OneShot(left)) if left <= week);
        same("a timer due in a week is armed", armed, true)?;
        if context.progress.plant() {
            counter.read()?;
        }
    }
    for _ in 0..5 {
        same("a token at the end", tokens.read()?, 1)?;
    }
    same("no sixth token", tokens.read(), Err(Errno::EAGAIN))
}
