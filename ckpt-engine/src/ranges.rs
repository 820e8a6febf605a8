//! A set of addresses as disjoint ranges.

use std::collections::BTreeMap;

/// Disjoint, non-touching half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..end`.
    pub fn insert(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        while let Some((&low, &high)) = self.0.range(..=end).next_back() {
            if high < start {
                break;
            }
            start = start.min(low);
            end = end.max(high);
            self.0.remove(&low);
        }
        self.0.insert(start, end);
    }

    /// Takes `start..end` out.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        while let Some((&low, &high)) = self.0.range(..end).next_back() {
            if high <= start {
                break;
            }
            self.0.remove(&low);
            if low < start {
                self.0.insert(low, start);
            }
            if high > end {
                self.0.insert(end, high);
            }
        }
    }

    /// The ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(&start, &end)| (start, end))
    }

    /// What is in `self` but not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        for (start, end) in self.iter() {
            let mut next = start;
            for (low, high) in other.within(start, end) {
                if next < low {
                    rest.0.insert(next, low);
                }
                next = high;
            }
            if next < end {
                rest.0.insert(next, end);
            }
        }
        rest
    }

    /// What is in both.
    pub fn common(&self, other: &Self) -> Self {
        let common = self.iter().flat_map(|(start, end)| other.within(start, end));
        Self(common.collect())
    }

    /// The parts that lie in `start..end`, in ascending order.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before = self.0.range(..start).next_back();
        let before = before.filter(|&(_, &high)| high > start);
        let first = before.map_or(start, |(&low, _)| low);
        let inside =
            if first < end { self.0.range(first..end) } else { self.0.range(first..first) };
        inside.map(move |(&low, &high)| (low.max(start), high.min(end)))
    }

    /// True when all of `start..end` is in it.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        start < end && self.within(start, end).next() == Some((start, end))
    }

    /// True when nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(u64, u64)> for Ranges {
    fn from_iter<T: IntoIterator<Item = (u64, u64)>>(ranges: T) -> Self {
        let mut set = Self::default();
        for (start, end) in ranges {
            set.insert(start, end);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_behave_like_a_set_of_numbers(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..16), 0..40)
        ) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (insert, start, len) in steps {
                if insert {
                    ranges.insert(start, start + len);
                    model.extend(start..start + len);
                } else {
                    ranges.remove(start, start + len);
                    model.retain(|n| !(start..start + len).contains(n));
                }
            }
            let flat: BTreeSet<u64> = ranges.iter().flat_map(|(start, end)| start..end).collect();
            prop_assert_eq!(&flat, &model);
            let other = Ranges::from_iter([(5, 9), (20, 21), (33, 60)]);
            let numbers = |ranges: Ranges| -> BTreeSet<u64> {
                ranges.iter().flat_map(|(start, end)| start..end).collect()
            };
            let theirs = numbers(other.clone());
            prop_assert_eq!(numbers(ranges.without(&other)), &model - &theirs);
            prop_assert_eq!(numbers(ranges.common(&other)), &model & &theirs);
            prop_assert_eq!(ranges.covers(7, 12), (7..12).all(|n| model.contains(&n)));
            let list: Vec<_> = ranges.iter().collect();
            prop_assert!(list.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}
