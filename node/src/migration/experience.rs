//! What earlier moves say about the costs of the next one.
//!
//! The costs of [`Fixed`](super::rounds::Fixed) were measured on one machine, with one kind of VE.
//! How a move came out says how they are here: for this VE, whose sockets or files may cost more
//! than others', and until it has moved, for the VEs of this node. Large and small VEs tell apart what
//! a move costs in any case and what it costs for each thing in a VE.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use super::rounds::{Cost, Factors, Prediction};

/// So many moves of a VE count, the last ones.
const MOVES: usize = 5;
/// So many moves of a node count, the last ones.
const MOVES_OF_ALL: usize = 40;
/// VEs that are remembered; all are forgotten when there are more.
const VES_MAX: usize = 10_000;

/// How many times as much as expected the last moves took. The middle one counts: a move on a node
/// that was busy for a moment says little about the next.
#[derive(Clone, Debug, Default)]
struct Seen(VecDeque<f64>);

impl Seen {
    fn push(&mut self, factor: f64) {
        self.0.push_back(factor);
        if self.0.len() > MOVES {
            self.0.pop_front();
        }
    }

    fn factor(&self) -> Option<f64> {
        let mut seen: Vec<f64> = self.0.iter().copied().collect();
        seen.sort_by(f64::total_cmp);
        seen.get(seen.len() / 2).copied()
    }
}

/// The moves of all VEs: for each, which shares of what it took were expected for the two parts of
/// its cost.
#[derive(Debug, Default)]
struct All(VecDeque<[f64; 2]>);

impl All {
    fn push(&mut self, cost: Cost, factor: f64) {
        let took = cost.whole().as_secs_f64() * factor;
        self.0.push_back([cost.base, cost.each].map(|part| part.as_secs_f64() / took));
        if self.0.len() > MOVES_OF_ALL {
            self.0.pop_front();
        }
    }

    /// Those with which all moves would have been nearest to what was expected, each measured by
    /// what it took: one that was disturbed has small shares, and so little to say.
    fn factors(&self) -> Option<Factors> {
        /// How far the two may be apart, against the moves that say so: where all VEs are alike,
        /// nothing tells them apart.
        const TOGETHER: f64 = 0.02;
        let sum = |term: fn(&[f64; 2]) -> f64| self.0.iter().map(term).sum::<f64>();
        let (bb, ee, be) =
            (sum(|it| it[0] * it[0]), sum(|it| it[1] * it[1]), sum(|it| it[0] * it[1]));
        let (b, e) = (sum(|it| it[0]), sum(|it| it[1]));
        let (bb, ee, be) = (bb + TOGETHER, ee + TOGETHER, be - TOGETHER);
        let determinant = bb * ee - be * be;
        (!self.0.is_empty() && determinant > 0.0).then(|| Factors {
            base: ((b * ee - e * be) / determinant).clamp(0.1, 100.0),
            each: ((e * bb - b * be) / determinant).clamp(0.1, 100.0),
        })
    }
}

/// The moves of this daemon so far.
#[derive(Debug, Default)]
pub(super) struct Experience {
    all: All,
    by_ve: HashMap<u32, Seen>,
}

impl Experience {
    /// How many times as much as on the machine that was measured this VE will take.
    pub(super) fn factors(&self, ve: u32) -> Factors {
        let own = self.by_ve.get(&ve).and_then(Seen::factor).map(Factors::both);
        own.or_else(|| self.all.factors()).unwrap_or(Factors::both(1.0))
    }

    /// Takes in how a move came out.
    pub(super) fn learn(&mut self, ve: u32, predicted: Prediction, total: Duration) {
        let Some((cost, factor)) = predicted.came_out(total) else { return };
        self.all.push(cost, factor);
        if self.by_ve.len() >= VES_MAX {
            self.by_ve.clear();
        }
        self.by_ve.entry(ve).or_default().push(factor);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::rounds::Fixed, *};

    const DELTA: Duration = Duration::from_millis(4);

    fn taught(experience: &mut Experience, ve: u32, real: Duration) -> Prediction {
        for turn in 0..10 {
            let predicted = Prediction::new(DELTA, Fixed::default(), experience.factors(ve));
            // Every fourth move is disturbed.
            experience.learn(ve, predicted, if turn % 4 == 3 { real * 5 } else { real });
        }
        Prediction::new(DELTA, Fixed::default(), experience.factors(ve))
    }

    fn ratio(predicted: Prediction, real: Duration) -> f64 {
        predicted.total.as_secs_f64() / real.as_secs_f64()
    }

    #[test]
    fn moves_teach_what_a_ve_costs() {
        let mut experience = Experience::default();
        for (ve, ms) in [(101, 40), (102, 200)] {
            let real = Duration::from_millis(ms);
            let ratio = ratio(taught(&mut experience, ve, real), real);
            assert!((0.9..1.1).contains(&ratio), "{ratio}");
        }
        // The first one has not changed by what the second one taught.
        assert!(experience.factors(101).base < experience.factors(102).base / 3.0);
    }

    #[test]
    fn a_ve_that_has_never_moved_is_like_the_others() {
        let mut experience = Experience::default();
        assert_eq!(experience.factors(1), Factors::both(1.0));
        let real = Duration::from_millis(40);
        let known = taught(&mut experience, 101, real);
        let new = Prediction::new(DELTA, Fixed::default(), experience.factors(102));
        assert!((0.9..1.1).contains(&ratio(new, known.total)), "{new:?}");
    }

    #[test]
    fn small_ves_say_nothing_about_what_each_process_costs() {
        let many = Fixed { processes: 1000, threads: 1000, ..Fixed::default() };
        let few = Fixed { processes: 10, threads: 10, ..Fixed::default() };
        let mut experience = Experience::default();
        let learn = |experience: &mut Experience, ve, fixed, ms| {
            let predicted = Prediction::new(DELTA, fixed, experience.factors(ve));
            experience.learn(ve, predicted, DELTA + Duration::from_millis(ms));
        };
        // The disk of the log is slow, processes are not.
        for turn in 0..6 {
            learn(&mut experience, turn, few, 30);
        }
        learn(&mut experience, 100, many, 220);
        let told = |fixed| Prediction::new(DELTA, fixed, experience.factors(200)).total - DELTA;
        let ratio = |fixed, ms: f64| told(fixed).as_secs_f64() * 1e3 / ms;
        assert!((0.85..1.15).contains(&ratio(few, 30.0)), "{:?}", told(few));
        assert!((0.85..1.15).contains(&ratio(many, 220.0)), "{:?}", told(many));
    }
}
