//! What earlier moves say about the costs of the next one.
//!
//! The costs of [`Fixed`](super::rounds::Fixed) were measured on one machine, with one kind of VE, and
//! a look at a VE that runs takes longer than one at a VE that stands still.
//! How a move came out says how they are here: for this VE, whose sockets or files may cost more
//! than others', and until it has moved, for the VEs of this node. What is known of a VE goes with
//! it to the next node.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use super::rounds::{FACTORS, Prediction};

/// So many moves count, the last ones.
const MOVES: usize = 5;
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

/// The moves of this daemon so far.
#[derive(Debug, Default)]
pub(super) struct Experience {
    all: Seen,
    by_ve: HashMap<u32, Seen>,
}

impl Experience {
    /// How many times as much as it seems this VE will cost, but for its bytes.
    pub(super) fn factor(&self, ve: u32) -> f64 {
        let own = self.by_ve.get(&ve).and_then(Seen::factor);
        own.or_else(|| self.all.factor()).unwrap_or(1.0)
    }

    /// How the last moves of this VE came out, for the node that it moves to.
    pub(super) fn of(&self, ve: u32) -> Vec<f64> {
        self.by_ve.get(&ve).map(|seen| seen.0.iter().copied().collect()).unwrap_or_default()
    }

    /// Takes over what another node has found out about a VE.
    pub(super) fn take_over(&mut self, ve: u32, factors: &[f64]) {
        if factors.is_empty() {
            return;
        }
        let mut seen = Seen::default();
        for &factor in factors.iter().filter(|factor| factor.is_finite()) {
            seen.push(factor.clamp(*FACTORS.start(), *FACTORS.end()));
        }
        self.remember(ve, seen);
    }

    fn remember(&mut self, ve: u32, seen: Seen) {
        if self.by_ve.len() >= VES_MAX && !self.by_ve.contains_key(&ve) {
            self.by_ve.clear();
        }
        self.by_ve.insert(ve, seen);
    }

    /// Takes in how a move came out.
    pub(super) fn learn(&mut self, ve: u32, predicted: Prediction, total: Duration) {
        let Some(factor) = predicted.came_out(total) else { return };
        self.all.push(factor);
        let mut seen = self.by_ve.get(&ve).cloned().unwrap_or_default();
        seen.push(factor);
        self.remember(ve, seen);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::rounds::Fixed, *};

    const BYTES: Duration = Duration::from_millis(2);
    const LOOK: Duration = Duration::from_millis(2);

    fn predicted(look: Duration, factor: f64) -> Prediction {
        Prediction::new(BYTES, look, Fixed::default(), factor)
    }

    fn taught(experience: &mut Experience, ve: u32, real: Duration) -> Prediction {
        for turn in 0..10 {
            let predicted = predicted(LOOK, experience.factor(ve));
            // Every fourth move is disturbed.
            experience.learn(ve, predicted, if turn % 4 == 3 { real * 5 } else { real });
        }
        predicted(LOOK, experience.factor(ve))
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
        assert!(experience.factor(101) < experience.factor(102) / 3.0);
    }

    #[test]
    fn a_look_that_takes_longer_while_the_ve_runs_is_learned() {
        let (look, real) = (Duration::from_millis(60), Duration::from_millis(40));
        let mut experience = Experience::default();
        experience.learn(101, predicted(look, 1.0), real);
        let ratio = ratio(predicted(look, experience.factor(101)), real);
        assert!((0.99..1.01).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_ve_that_has_never_moved_is_like_the_others() {
        let mut experience = Experience::default();
        assert_eq!(experience.factor(1), 1.0);
        let real = Duration::from_millis(40);
        taught(&mut experience, 101, real);
        assert_eq!(experience.factor(102), experience.factor(101));
    }

    #[test]
    fn what_a_ve_costs_goes_with_it() {
        let (mut source, mut target) = (Experience::default(), Experience::default());
        taught(&mut target, 102, Duration::from_millis(30));
        taught(&mut source, 101, Duration::from_millis(200));
        target.take_over(101, &source.of(101));
        assert_eq!(target.factor(101), source.factor(101));
        assert_ne!(target.factor(102), source.factor(101));
        // A node that knows nothing says nothing.
        target.take_over(101, &source.of(7));
        assert_eq!(target.factor(101), source.factor(101));
    }

    #[test]
    fn nonsense_of_another_node_does_little_harm() {
        let mut experience = Experience::default();
        experience.take_over(101, &[f64::NAN, f64::INFINITY, -1.0, 1e300]);
        assert!(FACTORS.contains(&experience.factor(101)));
        experience.take_over(101, &[2.0; 10_000]);
        assert_eq!(experience.of(101).len(), MOVES);
    }
}
