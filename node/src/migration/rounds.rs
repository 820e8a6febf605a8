//! When to stop copying a running VE and freeze it.
//!
//! Pure: fed with what each round measured, it says what to do next. The blackout that a freeze
//! now would cost is predicted from what the VE writes in the time of a round, the measured
//! rate of the link and both ends, the costs that do not depend on memory, and how earlier moves
//! came out.
//!
//! A VE that writes faster than it can be copied climbs a ladder: more rounds while they help;
//! then it is slowed down, step by step; then it is frozen although the budget is not met, or, if
//! the user allows it, moved before all its memory is there.

use std::{ops::RangeInclusive, time::Duration};

/// What one round measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    /// Bytes of pages and files sent.
    pub(super) bytes: u64,
    /// From its start until the target had applied all of it.
    pub(super) time: Duration,
    /// How much of it the data waited for nothing but a limit of the bandwidth, which does not
    /// count in the blackout.
    pub(super) waited: Duration,
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
    /// Those of them that are sockets, without the connections below.
    pub(super) sockets: usize,
    /// TCP connections that the target has made already.
    pub(super) connections: usize,
}

impl Fixed {
    /// Freeze, capture, rebuild and switch, without any page, on the machine that the numbers
    /// were measured on.
    fn cost(self) -> Duration {
        const BASE: Duration = Duration::from_micros(8_500);
        const PROCESS: Duration = Duration::from_micros(60);
        const THREAD: Duration = Duration::from_micros(40);
        const DESCRIPTOR: Duration = Duration::from_micros(10);
        const SOCKET: Duration = Duration::from_micros(45);
        const CONNECTION: Duration = Duration::from_micros(5);
        BASE + PROCESS * self.processes as u32
            + THREAD * self.threads as u32
            + DESCRIPTOR * self.descriptors as u32
            + SOCKET * self.sockets as u32
            + CONNECTION * self.connections as u32
    }
}

/// How many times as much as measured the fixed costs can be said to be.
pub(super) const FACTORS: RangeInclusive<f64> = 0.1..=100.0;

/// A blackout that is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prediction {
    /// The bytes of the last round, at the rate of the link and both ends.
    bytes: Duration,
    /// Everything else, as it would be where the numbers were measured.
    rest: Duration,
    /// All of it, here.
    pub(super) total: Duration,
}

impl Prediction {
    /// `look` is what the last round took beyond its bytes. `factor` is how many times as much as
    /// all but the bytes seems to cost it comes to.
    pub(super) fn new(bytes: Duration, look: Duration, fixed: Fixed, factor: f64) -> Self {
        // Nothing that is looked at runs meanwhile, and what was asked before is not asked again.
        let rest = look / 2 + fixed.cost();
        Self { bytes, rest, total: bytes + rest.mul_f64(factor) }
    }

    /// The factor with which it would have been right; none where that cannot be told.
    pub(super) fn came_out(self, total: Duration) -> Option<f64> {
        // Where pages were most of it, the rest is lost in their noise.
        if self.bytes > self.rest * 2 || self.rest.is_zero() {
            return None;
        }
        let rest = total.saturating_sub(self.bytes).as_secs_f64();
        Some((rest / self.rest.as_secs_f64()).clamp(*FACTORS.start(), *FACTORS.end()))
    }

    /// When this share of the last round's pages comes only after the switch. What tells of them
    /// still goes before it.
    pub(super) fn without(self, share: f64) -> Self {
        const TOLD: f64 = 0.02;
        let bytes = self.bytes.mul_f64(1.0 - share.clamp(0.0, 1.0) * (1.0 - TOLD));
        Self { bytes, total: self.total.saturating_sub(self.bytes - bytes), ..self }
    }

    /// For a VE of which nothing was copied while it ran. It says nothing about this node, so
    /// nothing is learned from it.
    pub(super) fn of_all(bytes: u64) -> Self {
        let all = Duration::from_secs_f64(bytes as f64 / RATE);
        Self { bytes: all, rest: Duration::ZERO, total: all }
    }
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Copy again what was written meanwhile.
    Again,
    /// Leave the VE only this share of the CPU time that it used, and copy again.
    Slow {
        /// The share.
        percent: u8,
    },
    /// Freeze now.
    Freeze(Prediction),
}

/// The shares of its CPU time that a VE is left, one after the other.
const STEPS: [u8; 3] = [50, 25, 10];
/// The most rounds on one rung that are worth their cost.
const ROUNDS_MAX: usize = 30;
/// Rounds in a row without a better prediction, after which more do not help.
const PATIENCE: usize = 3;
/// The same for a VE that suffers from it.
const PATIENCE_SLOWED: usize = 1;
/// What counts as better.
const BETTER: f64 = 0.95;
/// Where the last round is predicted to carry no more than this there is nothing to gain any
/// more: the rest is fixed.
const GOOD_ENOUGH: Duration = Duration::from_millis(2);

/// Bytes per second of a link that nothing is known of.
const RATE: f64 = 100e6;

/// Decides after each round.
#[derive(Debug)]
pub(super) struct Policy {
    budget: Duration,
    factor: f64,
    steps: std::slice::Iter<'static, u8>,
    slowed: bool,
    /// The last three rounds, the latest first.
    rounds: [Option<Measured>; 3],
    /// How what the VE writes grows with time: 1 if it never writes a page twice, 0 if it always
    /// writes the same ones.
    growth: f64,
    /// Bytes per second.
    rate: Option<f64>,
    rounds_on_rung: usize,
    best: Duration,
    since_best: usize,
}

impl Policy {
    /// For a blackout of at most `budget`, with this factor of [`Prediction::new`]. Without
    /// `can_slow` there is no step between more rounds and the freeze.
    pub(super) fn new(budget: Duration, factor: f64, can_slow: bool) -> Self {
        let steps = if can_slow { &STEPS[..] } else { &[] };
        Self {
            budget,
            factor,
            steps: steps.iter(),
            slowed: false,
            rounds: [None; 3],
            growth: 0.5,
            rate: None,
            rounds_on_rung: 0,
            best: Duration::MAX,
            since_best: 0,
        }
    }

    /// Takes the measurements of a round and says how to go on.
    pub(super) fn after(&mut self, round: Measured, fixed: Fixed) -> Next {
        self.measure(round);
        // The first round says nothing about how much the VE writes.
        let Some((bytes, look)) = self.expected_delta() else { return Next::Again };
        let predicted = Prediction::new(bytes, look, fixed, self.factor);
        self.rounds_on_rung += 1;
        if predicted.total < self.best.mul_f64(BETTER) {
            self.best = predicted.total;
            self.since_best = 0;
        } else {
            self.since_best += 1;
        }
        let in_budget = !self.is_over_budget(predicted);
        let few = bytes <= GOOD_ENOUGH;
        let nothing_to_gain = few || self.slowed;
        // Without any bytes it would still be too long: a slower VE would only suffer.
        let in_vain = few || predicted.total - bytes > self.budget;
        let patience = if self.slowed { PATIENCE_SLOWED } else { PATIENCE };
        let helps = self.since_best < patience && self.rounds_on_rung < ROUNDS_MAX;
        match () {
            () if in_budget && (nothing_to_gain || !helps) => Next::Freeze(predicted),
            () if helps => Next::Again,
            () if in_vain => Next::Freeze(predicted),
            () => match self.steps.next() {
                Some(&percent) => {
                    self.slowed = true;
                    (self.rounds_on_rung, self.best, self.since_best) = (0, Duration::MAX, 0);
                    Next::Slow { percent }
                }
                None => Next::Freeze(predicted),
            },
        }
    }

    /// True when the last word was to freeze although the budget cannot be met.
    pub(super) fn is_over_budget(&self, predicted: Prediction) -> bool {
        predicted.total > self.budget
    }

    fn measure(&mut self, round: Measured) {
        /// A round this large is worth more than all before it: links change. In smaller ones much
        /// of the time goes into looking at the VE.
        const BULK: u64 = 64 << 20;
        const SMALLEST: u64 = 64 << 10;
        let busy = round.time.saturating_sub(round.waited);
        if round.bytes >= SMALLEST && !busy.is_zero() {
            let rate = round.bytes as f64 / busy.as_secs_f64();
            let before = self.rate.filter(|_| round.bytes < BULK).unwrap_or(0.0);
            self.rate = Some(rate.max(before));
        }
        self.rounds = [Some(round), self.rounds[0], self.rounds[1]];
        if let [Some(last), Some(previous), Some(first)] = self.rounds {
            // What a round carries was written while the round before it went on.
            let longer = ratio(previous.time, first.time);
            let more = last.bytes as f64 / previous.bytes.max(1) as f64;
            // From nearly equal times nothing can be told.
            if longer < 0.8 && more > 0.0 {
                self.growth = (more.ln() / longer.ln()).clamp(0.2, 1.0);
            }
        }
    }

    /// How long it takes to send what the VE will have written when it is frozen, and how much longer
    /// the last round will take than that.
    fn expected_delta(&self) -> Option<(Duration, Duration)> {
        let (last, previous) = (self.rounds[0]?, self.rounds[1]?);
        // The more time, the more is written, but programs write the same pages again and again.
        let share = ratio(last.time, previous.time).powf(self.growth).min(1.0);
        let rate = self.rate.unwrap_or(RATE);
        let seconds = |bytes: f64| Duration::from_secs_f64(bytes / rate);
        let bytes = seconds(last.bytes as f64 * share);
        let saved = seconds(last.bytes as f64 * (1.0 - share));
        let busy = last.time.saturating_sub(last.waited);
        Some((bytes, busy.saturating_sub(saved + bytes)))
    }
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(100);

    fn round(mebibytes: f64, ms: u64) -> Measured {
        let bytes = (mebibytes * 1048576.0) as u64;
        Measured { bytes, time: Duration::from_millis(ms), waited: Duration::ZERO }
    }

    fn policy(can_slow: bool) -> Policy {
        Policy::new(BUDGET, 1.0, can_slow)
    }

    /// Plays a VE that writes `mebibytes_per_s` over a hot set, on a link of 100 MiB/s.
    fn play(policy: &mut Policy, mebibytes_per_s: f64, hot: f64) -> (Vec<u8>, Prediction, f64) {
        let (mut steps, mut time, mut share) = (Vec::new(), 2.0, 1.0);
        for number in 0..1000 {
            let left = (mebibytes_per_s * share * time).min(hot);
            let bytes = if number == 0 { 200.0 } else { left };
            time = 0.005 + bytes / 100.0;
            match policy.after(round(bytes, (time * 1000.0) as u64), Fixed::default()) {
                Next::Again => {}
                Next::Slow { percent } => {
                    steps.push(percent);
                    share = f64::from(percent) / 100.0;
                }
                Next::Freeze(predicted) => {
                    let left = (mebibytes_per_s * share * time).min(hot);
                    return (steps, predicted, left / 100.0 + 0.014);
                }
            }
        }
        panic!("no end");
    }

    #[test]
    fn an_idle_ve_is_frozen_after_the_second_round() {
        let mut policy = policy(true);
        assert_eq!(policy.after(round(256.0, 800), Fixed::default()), Next::Again);
        let next = policy.after(round(0.1, 5), Fixed::default());
        assert!(
            matches!(next, Next::Freeze(it) if it.total < Duration::from_millis(20)),
            "{next:?}"
        );
    }

    #[test]
    fn a_ve_that_cannot_be_slowed_down_is_given_up_on() {
        let mut policy = policy(false);
        let (steps, predicted, _) = play(&mut policy, 1000.0, 200.0);
        assert!(steps.is_empty());
        assert!(policy.is_over_budget(predicted));
    }

    #[test]
    fn a_ve_that_writes_too_fast_is_slowed_down_until_it_fits() {
        let mut policy = policy(true);
        // Two and a half times as fast as the link: a quarter of that is slow enough.
        let (steps, predicted, came_out) = play(&mut policy, 250.0, 150.0);
        assert_eq!(steps, [50, 25]);
        assert!(!policy.is_over_budget(predicted));
        assert!(came_out <= BUDGET.as_secs_f64(), "{came_out}");
    }

    #[test]
    fn a_ve_that_takes_long_to_look_at_is_not_slowed_down() {
        let mut policy = policy(true);
        assert_eq!(policy.after(round(256.0, 800), Fixed::default()), Next::Again);
        for _ in 0..20 {
            // Large files that are compared, and little that has changed in them.
            match policy.after(round(3.0, 300), Fixed::default()) {
                Next::Again => {}
                Next::Freeze(predicted) => {
                    assert!(policy.is_over_budget(predicted), "{predicted:?}");
                    return;
                }
                slow @ Next::Slow { .. } => panic!("{slow:?}"),
            }
        }
        panic!("no end");
    }

    #[test]
    fn a_ve_that_writes_slower_than_the_link_is_not_slowed_down() {
        let (steps, predicted, came_out) = play(&mut policy(true), 50.0, 150.0);
        assert!(steps.is_empty(), "{steps:?}");
        assert!(predicted.total.as_secs_f64() > came_out * 0.7, "{predicted:?} {came_out}");
    }

    #[test]
    fn nothing_helps_against_a_ve_that_writes_as_fast_as_memory() {
        let mut policy = policy(true);
        let (steps, predicted, came_out) = play(&mut policy, 10_000.0, 150.0);
        assert_eq!(steps, STEPS);
        assert!(policy.is_over_budget(predicted));
        let told = predicted.total.as_secs_f64();
        assert!((came_out * 0.7..came_out * 1.3).contains(&told), "{told} {came_out}");
    }

    #[test]
    fn a_slow_link_is_believed() {
        let mut policy = policy(false);
        let mut last = Next::Again;
        while last == Next::Again {
            last = policy.after(round(10.0, 1000), Fixed::default());
        }
        assert!(matches!(last, Next::Freeze(it) if it.total > Duration::from_millis(900)));
    }

    #[test]
    fn a_limit_of_the_bandwidth_is_not_taken_for_a_slow_link() {
        let mut policy = policy(false);
        let limited = |mebibytes: f64, ms| {
            let round = round(mebibytes, ms);
            Measured { waited: round.time * 9 / 10, ..round }
        };
        assert_eq!(policy.after(limited(200.0, 20_000), Fixed::default()), Next::Again);
        let mut last = Next::Again;
        while last == Next::Again {
            last = policy.after(limited(2.0, 200), Fixed::default());
        }
        assert!(
            matches!(last, Next::Freeze(it) if it.total < Duration::from_millis(50)),
            "{last:?}"
        );
    }

    #[test]
    fn what_comes_later_costs_no_blackout() {
        let predicted =
            Prediction::new(Duration::from_secs(2), Duration::ZERO, Fixed::default(), 1.0);
        let most = predicted.without(0.95);
        assert!(most.total < Duration::from_millis(160), "{most:?}");
        assert_eq!(predicted.without(0.0), predicted);
        assert!(predicted.without(7.0).total >= Fixed::default().cost());
    }

    #[test]
    fn more_processes_cost_more() {
        let many = Fixed { processes: 1000, ..Fixed::default() };
        assert!(many.cost() > Fixed::default().cost() * 5);
    }
}
