//! How fast moves may send.
//!
//! A move has its own limit (`vzmigrate --bwlimit`), and all moves from a node share that of the
//! cluster (`vzcluster bandwidth`): pieces of all that are under way wait in one queue, so that
//! each gets its turn. A VE that stands still waits for nothing: what is left then is little, and
//! every millisecond counts.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Mutex, watch},
    time::sleep_until,
};

use super::source::Context;

/// When the next piece may be sent.
#[derive(Debug, Default)]
struct Queue(Option<Instant>);

impl Queue {
    /// The turn of a piece that asks now. `rate` is in bytes per second.
    fn turn(&mut self, now: Instant, bytes: usize, rate: u64) -> Instant {
        let turn = self.0.map_or(now, |next| next.max(now));
        self.0 = Some(turn + Duration::from_secs_f64(bytes as f64 / rate as f64));
        turn
    }
}

/// A pace that pieces are sent at, in the order in which they ask.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    /// In bytes per second; 0 stands for no limit.
    rate: watch::Sender<u64>,
    queue: Mutex<Queue>,
}

impl Limiter {
    /// With a limit in bytes per second, if there is one.
    pub(super) fn new(rate: Option<u64>) -> Self {
        let limiter = Self::default();
        limiter.set(rate);
        limiter
    }

    /// Changes the limit, also for pieces that wait for their turn already.
    pub(super) fn set(&self, rate: Option<u64>) {
        let rate = rate.unwrap_or(0);
        self.rate.send_if_modified(|now| std::mem::replace(now, rate) != rate);
    }

    /// Waits until a piece of so many bytes may be sent. Whoever asks later is served later: it
    /// waits for the lock.
    async fn pass(&self, bytes: usize) {
        if *self.rate.borrow() == 0 {
            return;
        }
        let mut queue = self.queue.lock().await;
        let mut rates = self.rate.subscribe();
        loop {
            let rate = *rates.borrow_and_update();
            if rate == 0 {
                return;
            }
            let turn = queue.turn(Instant::now(), bytes, rate);
            tokio::select! {
                () = sleep_until(turn.into()) => return,
                // What was sent at another rate has been waited for.
                _ = rates.changed() => *queue = Queue::default(),
            }
        }
    }
}

/// The limits of one move.
#[derive(Clone, Debug)]
pub(super) struct Pace(Arc<Limits>);

#[derive(Debug)]
struct Limits {
    own: Limiter,
    shared: Arc<Limiter>,
    lifted: AtomicBool,
    waited_ns: AtomicU64,
}

impl Pace {
    /// A limit of its own in bytes per second, beside what all moves share.
    pub(super) fn new(own: Option<u64>, shared: Arc<Limiter>) -> Self {
        Self(Arc::new(Limits {
            own: Limiter::new(own),
            shared,
            lifted: AtomicBool::new(false),
            waited_ns: AtomicU64::new(0),
        }))
    }

    /// Waits for the turn of a piece.
    pub(super) async fn pass(&self, bytes: usize) {
        if self.0.lifted.load(Ordering::Relaxed) {
            return;
        }
        let start = Instant::now();
        self.0.own.pass(bytes).await;
        self.0.shared.pass(bytes).await;
        self.0.waited_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Whether limits count. They do not while the VE stands still.
    pub(super) fn lift(&self, lifted: bool) {
        self.0.lifted.store(lifted, Ordering::Relaxed);
    }

    /// How long pieces have waited so far for nothing but their turn.
    pub(super) fn waited(&self) -> Duration {
        Duration::from_nanos(self.0.waited_ns.load(Ordering::Relaxed))
    }
}

/// Keeps to what the cluster has agreed on, for as long as the daemon runs.
pub(super) async fn follow(context: Context) {
    /// A node that joins a cluster gets another log, which tells nobody who waits for the old.
    const INTERVAL: Duration = Duration::from_secs(1);
    loop {
        let mut states = context.coordinator().watch();
        context.limiter.set(states.borrow_and_update().bandwidth);
        // Whether it changed, ended or took too long: all are reasons to look again.
        let changed = tokio::time::timeout(INTERVAL, states.changed()).await;
        if matches!(changed, Ok(Err(_))) {
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;
    const RATE: u64 = 10 << 20;

    #[test]
    fn pieces_keep_the_pace_and_what_was_not_used_is_gone() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        let mut after = |at_ms, bytes| {
            let now = start + Duration::from_millis(at_ms);
            queue.turn(now, bytes, RATE).duration_since(start).as_millis()
        };
        assert_eq!([after(0, MIB), after(0, MIB), after(50, 2 * MIB)], [0, 100, 200]);
        assert_eq!([after(60, MIB), after(1000, MIB), after(1000, MIB)], [400, 1000, 1100]);
    }

    #[tokio::test]
    async fn a_limit_is_kept_until_it_is_lifted() {
        let pace = Pace::new(None, Arc::new(Limiter::new(Some(RATE))));
        for _ in 0..3 {
            pace.pass(MIB / 2).await;
        }
        assert!(pace.waited() >= Duration::from_millis(100), "{:?}", pace.waited());
        pace.lift(true);
        let waited = pace.waited();
        pace.pass(1 << 40).await;
        pace.pass(1 << 40).await;
        assert_eq!(pace.waited(), waited);
    }

    #[tokio::test]
    async fn a_piece_that_waits_follows_a_new_limit() {
        let limiter = Arc::new(Limiter::new(Some(1)));
        let waiting = limiter.clone();
        // The second one would have to wait for years.
        let pieces = tokio::spawn(async move {
            waiting.pass(1 << 40).await;
            waiting.pass(1 << 40).await;
        });
        tokio::task::yield_now().await;
        limiter.set(Some(2));
        tokio::task::yield_now().await;
        limiter.set(None);
        pieces.await.unwrap();
    }
}
