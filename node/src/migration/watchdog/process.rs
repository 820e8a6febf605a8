//! The watchdog itself: a process without the daemon's memory, threads and descriptors.

use std::{
    io,
    os::unix::net::UnixStream,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_engine::surgeon::{self, Theatre};

use super::{Answer, Order, Standing, inherited, lock, receive, send};
use crate::api::chain;

/// Between two attempts to end a freeze that a hanging daemon may renew.
const AGAIN: Duration = Duration::from_secs(1);

/// What the watchdog knows of the VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeze {
    /// It runs.
    None,
    /// It stands still, and should not do so after this moment.
    Until(Instant),
    /// It stood still for too long.
    Ended(Instant),
}

/// What came from the daemon, or did not.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Order(Order),
    /// The daemon is dead.
    Closed,
    /// The time has come.
    Late,
}

/// What the watchdog does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Nothing.
    Wait,
    /// Says yes to the seal, and ends.
    Yield,
    /// Leaves it to the daemon to let the VE go on.
    GiveBack,
    /// Says that the freeze is over, and lets the VE go on.
    EndFreeze,
    /// Lets the VE go on once more.
    EndAgain,
    /// Says that the freeze is over.
    Refuse,
    /// Lets the VE go on, and ends.
    PutRight,
    /// Gives the VE its CPU time back, and ends.
    Unbrake,
    /// Ends.
    Leave,
}

/// The next state and the act. All that is decided is decided here.
fn step(freeze: Freeze, event: &Event, now: Instant) -> (Freeze, Act) {
    match (freeze, event) {
        (Freeze::Ended(_), Event::Order(Order::Frozen { .. } | Order::Seal | Order::Reclaim)) => {
            (freeze, Act::Refuse)
        }
        // Should it hang or die in doing so, the VE is put right after all.
        (_, Event::Order(Order::Reclaim)) => (freeze, Act::GiveBack),
        (_, Event::Order(Order::Frozen { patience })) => {
            (Freeze::Until(now + *patience), Act::Wait)
        }
        (Freeze::Until(_), Event::Order(Order::Thawed)) => (Freeze::None, Act::Wait),
        (Freeze::Until(_), Event::Order(Order::Seal)) => (freeze, Act::Yield),
        // What does not stand still cannot be sealed.
        (Freeze::None, Event::Order(Order::Seal)) => (freeze, Act::Refuse),
        (_, Event::Order(Order::Thawed | Order::Guard { .. })) => (freeze, Act::Wait),
        (_, Event::Order(Order::Done)) => (freeze, Act::Leave),
        (Freeze::None, Event::Closed) => (freeze, Act::Unbrake),
        (_, Event::Closed) => (freeze, Act::PutRight),
        (Freeze::None, Event::Late) => (freeze, Act::Wait),
        (Freeze::Until(_), Event::Late) => (Freeze::Ended(now + AGAIN), Act::EndFreeze),
        // A hanging daemon may wake up, and freeze the VE again before it asks for the seal.
        (Freeze::Ended(_), Event::Late) => (Freeze::Ended(now + AGAIN), Act::EndAgain),
    }
}

/// The whole life of a watchdog.
pub(in crate::migration) fn main() -> ExitCode {
    match watch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the watchdog of a freeze cannot work");
            ExitCode::FAILURE
        }
    }
}

fn watch() -> io::Result<()> {
    let (socket, operations) = inherited()?;
    let theatre = Arc::new(Theatre::default());
    let table = theatre.clone();
    std::thread::Builder::new().spawn(move || operate(operations, &table))?;
    let watched = watch_over(&socket, &theatre);
    // Nothing is broken off half way.
    theatre.close();
    watched
}

/// Serves the surgeon's side. One thread for all: the kernel ties stopped threads to it.
fn operate(operations: UnixStream, theatre: &Theatre) {
    if let Err(error) = surgeon::serve(operations, theatre) {
        // The daemon has died: that is seen on the other socket, too.
        tracing::debug!(%error, "nobody waits for the outcome of an operation");
    }
}

fn watch_over(socket: &UnixStream, theatre: &Theatre) -> io::Result<()> {
    let Some(Order::Guard { standing, lock: path }) = receive(socket)? else { return Ok(()) };
    let _lock = lock(&path)?;
    send(socket, &Answer::Watching)?;
    let mut freeze = Freeze::None;
    loop {
        let event = next(socket, freeze)?;
        let (then, act) = step(freeze, &event, Instant::now());
        freeze = then;
        match act {
            Act::Wait => {}
            Act::Yield => return send(socket, &Answer::Sealed),
            Act::GiveBack => send(socket, &Answer::Reclaimed)?,
            Act::Refuse => send(socket, &Answer::Ended)?,
            Act::EndFreeze => {
                tracing::error!("the daemon hangs in a freeze; the VE goes on");
                // First said, then done: a daemon that asks for the seal from here on is told no.
                send(socket, &Answer::Ended)?;
                put_right(&standing, theatre);
            }
            Act::EndAgain => put_right(&standing, theatre),
            Act::PutRight => {
                tracing::warn!("the daemon died in a freeze; the VE goes on");
                put_right(&standing, theatre);
                return Ok(());
            }
            Act::Unbrake => {
                return standing.restore_cpu().map_err(io::Error::other);
            }
            Act::Leave => return Ok(()),
        }
    }
}

fn put_right(standing: &Standing, theatre: &Theatre) {
    theatre.close();
    if let Err(error) = standing.put_right() {
        tracing::error!("a VE is not all right after a freeze: {}", chain(&error));
    }
}

/// What happens next.
fn next(socket: &UnixStream, freeze: Freeze) -> io::Result<Event> {
    let timeout = match freeze {
        Freeze::None => None,
        Freeze::Until(end) | Freeze::Ended(end) => {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Event::Late);
            }
            Some(left)
        }
    };
    socket.set_read_timeout(timeout)?;
    match receive(socket) {
        Ok(Some(order)) => Ok(Event::Order(order)),
        Ok(None) => Ok(Event::Closed),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Event::Late),
        // A daemon that was killed with an answer unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Event::Closed),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Plays events, and returns what the watchdog did about each.
    fn play(events: &[Event]) -> Vec<Act> {
        let (mut freeze, mut now) = (Freeze::None, Instant::now());
        let mut acts = Vec::new();
        for event in events {
            now += Duration::from_secs(1);
            let (then, act) = step(freeze, event, now);
            freeze = then;
            acts.push(act);
        }
        acts
    }

    fn frozen() -> Event {
        Event::Order(Order::Frozen { patience: PATIENCE })
    }

    #[test]
    fn a_dead_daemon_ends_a_freeze() {
        assert_eq!(play(&[frozen(), Event::Closed]), [Act::Wait, Act::PutRight]);
    }

    #[test]
    fn a_ve_that_runs_only_gets_its_cpu_time_back() {
        let thawed = Event::Order(Order::Thawed);
        assert_eq!(play(&[frozen(), thawed, Event::Closed])[2], Act::Unbrake);
        assert_eq!(play(&[Event::Closed]), [Act::Unbrake]);
    }

    #[test]
    fn nobody_seals_what_the_watchdog_has_ended() {
        let seal = Event::Order(Order::Seal);
        let acts = play(&[frozen(), Event::Late, seal.clone(), Event::Late, frozen(), seal]);
        let ended = [Act::Wait, Act::EndFreeze, Act::Refuse, Act::EndAgain, Act::Refuse];
        assert_eq!(acts[..5], ended);
        assert_eq!(acts[5], Act::Refuse);
    }

    #[test]
    fn a_daemon_undoes_nothing_that_the_watchdog_has_put_right() {
        let reclaim = Event::Order(Order::Reclaim);
        assert_eq!(play(&[frozen(), Event::Late, reclaim.clone()])[2], Act::Refuse);
        // In time it may; and should it die in doing so, the VE is put right after all.
        let acts = play(&[frozen(), reclaim, Event::Closed]);
        assert_eq!(acts, [Act::Wait, Act::GiveBack, Act::PutRight]);
    }

    #[test]
    fn the_watchdog_yields_to_a_seal_in_time() {
        let seal = Event::Order(Order::Seal);
        assert_eq!(play(&[frozen(), seal.clone()]), [Act::Wait, Act::Yield]);
        // What does not stand still cannot be sealed.
        assert_eq!(play(&[seal]), [Act::Refuse]);
    }

    #[test]
    fn nothing_is_left_to_do_after_an_orderly_end() {
        assert_eq!(play(&[Event::Order(Order::Done)]), [Act::Leave]);
    }
}
