//! When to stop copying a running VE and freeze it.
//!
//! Pure: fed with what each round measured, it says what to do next. The blackout that a freeze
//! now would cost is predicted from what the VE writes in the time of a round, the measured
//! rate of the link and both ends, and the costs that do not depend on memory.

use std::time::Duration;

/// What one round measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    /// Bytes of pages and files sent.
    pub(super) bytes: u64,
    /// From its start until the target had applied all of it.
    pub(super) time: Duration,
}

/// What cannot be made smaller by more rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fixed {
    /// Processes in the VE.
    pub(super) processes: usize,
    /// Threads in the VE.
    pub(super) threads: usize,
    /// Open descriptors in the VE.
    pub(super) descriptors: usize,
}

impl Fixed {
    /// Freeze, capture, rebuild and switch, without any page.
    fn cost(self) -> Duration {
        const BASE: Duration = Duration::from_micros(6_000);
        const PROCESS: Duration = Duration::from_micros(700);
        const THREAD: Duration = Duration::from_micros(60);
        const DESCRIPTOR: Duration = Duration::from_micros(20);
        BASE + PROCESS * self.processes as u32
            + THREAD * self.threads as u32
            + DESCRIPTOR * self.descriptors as u32
    }
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Copy again what was written meanwhile.
    Again,
    /// Freeze now: the blackout is predicted to take this long.
    Freeze {
        /// The prediction.
        predicted: Duration,
    },
}

/// The most rounds that are worth their cost.
const ROUNDS_MAX: usize = 30;
/// Rounds in a row without a better prediction, after which more do not help.
const PATIENCE: usize = 3;
/// Where the prediction is this good there is nothing to gain any more: the rest is fixed.
const GOOD_ENOUGH: Duration = Duration::from_millis(2);

/// Decides after each round.
#[derive(Debug)]
pub(super) struct Policy {
    budget: Duration,
    rounds: Vec<Measured>,
    best: Duration,
    since_best: usize,
}

impl Policy {
    /// For a blackout of at most `budget`.
    pub(super) fn new(budget: Duration) -> Self {
        Self { budget, rounds: Vec::new(), best: Duration::MAX, since_best: 0 }
    }

    /// Takes the measurements of a round and says how to go on.
    pub(super) fn after(&mut self, round: Measured, fixed: Fixed) -> Next {
        self.rounds.push(round);
        let delta = self.predicted_delta();
        let predicted = delta + fixed.cost();
        if predicted < self.best {
            self.best = predicted;
            self.since_best = 0;
        } else {
            self.since_best += 1;
        }
        // The first round says nothing about how much the VE writes.
        let known = self.rounds.len() >= 2;
        let in_budget = predicted <= self.budget && delta <= GOOD_ENOUGH;
        let hopeless = self.since_best >= PATIENCE || self.rounds.len() >= ROUNDS_MAX;
        match known && (in_budget || hopeless) {
            true => Next::Freeze { predicted },
            false => Next::Again,
        }
    }

    /// True when the last word was to freeze although the budget cannot be met.
    pub(super) fn is_over_budget(&self, predicted: Duration) -> bool {
        predicted > self.budget
    }

    /// The time to send what the VE will have written when it is frozen: as much as it wrote in
    /// the last round's time, sent at the best rate seen.
    fn predicted_delta(&self) -> Duration {
        const SMALLEST: u64 = 64 << 10;
        let Some(last) = self.rounds.last() else { return Duration::MAX };
        let rate = self
            .rounds
            .iter()
            .filter(|round| round.bytes >= SMALLEST && !round.time.is_zero())
            .map(|round| round.bytes as f64 / round.time.as_secs_f64())
            .fold(100e6, f64::max);
        Duration::from_secs_f64(last.bytes as f64 / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(mebibytes: f64, ms: u64) -> Measured {
        let bytes = (mebibytes * 1048576.0) as u64;
        Measured { bytes, time: Duration::from_millis(ms) }
    }

    #[test]
    fn an_idle_ve_is_frozen_after_the_second_round() {
        let mut policy = Policy::new(Duration::from_millis(100));
        assert_eq!(policy.after(round(256.0, 800), Fixed::default()), Next::Again);
        let next = policy.after(round(0.1, 5), Fixed::default());
        assert!(
            matches!(next, Next::Freeze { predicted } if predicted < Duration::from_millis(10))
        );
    }

    #[test]
    fn a_ve_that_writes_faster_than_the_link_is_given_up_on() {
        let mut policy = Policy::new(Duration::from_millis(100));
        let mut rounds = 0;
        while policy.after(round(256.0, 800), Fixed::default()) == Next::Again {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX);
        }
        assert!(rounds >= PATIENCE);
    }

    #[test]
    fn shrinking_rounds_go_on() {
        let mut policy = Policy::new(Duration::from_millis(100));
        assert_eq!(policy.after(round(256.0, 800), Fixed::default()), Next::Again);
        assert_eq!(policy.after(round(64.0, 200), Fixed::default()), Next::Again);
        assert_eq!(policy.after(round(16.0, 50), Fixed::default()), Next::Again);
        assert_eq!(policy.after(round(4.0, 13), Fixed::default()), Next::Again);
        assert_ne!(policy.after(round(0.2, 3), Fixed::default()), Next::Again);
    }

    #[test]
    fn more_processes_cost_more() {
        let many = Fixed { processes: 1000, ..Fixed::default() };
        assert!(many.cost() > Fixed::default().cost() * 50);
    }
}
