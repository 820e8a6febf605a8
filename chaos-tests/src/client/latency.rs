//! How long requests took: a histogram, the longest, and the longest in each slice of time.

use std::time::Duration;

/// Counts latencies in buckets about 6 % wide.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    longest: Duration,
}

/// Each power of two is divided into this many buckets.
const STEPS: u64 = 16;

impl Histogram {
    /// Counts one request.
    pub fn add(&mut self, latency: Duration) {
        let index = bucket(micros(latency));
        if self.counts.len() <= index {
            self.counts.resize(index + 1, 0);
        }
        self.counts[index] += 1;
        self.total += 1;
        self.longest = self.longest.max(latency);
    }

    /// Lets the longest be at least this, without counting a request.
    pub fn note_waiting(&mut self, waiting: Duration) {
        self.longest = self.longest.max(waiting);
    }

    /// Adds all that another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (own, more) in self.counts.iter_mut().zip(&other.counts) {
            *own += more;
        }
        self.total += other.total;
        self.longest = self.longest.max(other.longest);
    }

    /// How many requests were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest request, exactly.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// The latency in microseconds that this share of the requests did not exceed.
    pub fn quantile_us(&self, share: f64) -> u64 {
        let mut left = (self.total as f64 * share).ceil() as u64;
        for (index, count) in self.counts.iter().enumerate() {
            if *count >= left {
                return upper_bound_us(index);
            }
            left -= count;
        }
        micros(self.longest)
    }

    /// The buckets that are not empty: upper bound in microseconds, and count.
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        let filled = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.map(|(index, count)| (upper_bound_us(index), *count)).collect()
    }
}

fn micros(latency: Duration) -> u64 {
    u64::try_from(latency.as_micros()).unwrap_or(u64::MAX)
}

fn bucket(us: u64) -> usize {
    let index = if us < STEPS {
        us
    } else {
        let power = u64::from(us.ilog2()) - 4;
        (power + 1) * STEPS + (us >> power) - STEPS
    };
    usize::try_from(index).unwrap_or(usize::MAX)
}

fn upper_bound_us(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index;
    }
    let power = index / STEPS - 1;
    let base = (index % STEPS + STEPS) << power;
    base + (1 << power) - 1
}

/// The longest latency in each slice of time, for plots.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// For each slice since the start: requests that ended in it, and the longest of them.
    pub slices: Vec<Slice>,
}

/// What ended in one slice of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slice {
    /// Requests that ended in it.
    pub requests: u32,
    /// The longest of them.
    pub longest_us: u32,
}

impl Series {
    /// The length of a slice.
    pub const SLICE: Duration = Duration::from_millis(10);

    /// Counts a request that ended at this time since the start.
    pub fn add(&mut self, ended: Duration, latency: Duration) {
        let index = (ended.as_micros() / Self::SLICE.as_micros()) as usize;
        if self.slices.len() <= index {
            self.slices.resize(index + 1, Slice::default());
        }
        let slice = &mut self.slices[index];
        slice.requests += 1;
        slice.longest_us = slice.longest_us.max(u32::try_from(micros(latency)).unwrap_or(u32::MAX));
    }

    /// Adds all that another series counted since the same start.
    pub fn merge(&mut self, other: &Self) {
        if self.slices.len() < other.slices.len() {
            self.slices.resize(other.slices.len(), Slice::default());
        }
        for (own, more) in self.slices.iter_mut().zip(&other.slices) {
            own.requests += more.requests;
            own.longest_us = own.longest_us.max(more.longest_us);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_belongs_in_them() {
        for us in [0, 1, 15, 16, 17, 31, 32, 33, 999, 1000, 65_535, 1 << 40] {
            let index = bucket(us);
            assert!(upper_bound_us(index) >= us, "{us} is above the bound of its bucket");
            assert!(index == 0 || upper_bound_us(index - 1) < us, "{us} belongs lower");
        }
    }

    #[test]
    fn quantiles_of_a_known_distribution() {
        let mut histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.add(Duration::from_micros(us));
        }
        let median = histogram.quantile_us(0.5);
        assert!((500..=531).contains(&median), "median {median}");
        assert_eq!(histogram.longest(), Duration::from_millis(1));
        assert_eq!(histogram.total(), 1000);
    }
}
