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
        let mut rest = self.clone();
        for (start, end) in other.iter() {
            rest.remove(start, end);
        }
        rest
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
            prop_assert_eq!(flat, model);
            let list: Vec<_> = ranges.iter().collect();
            prop_assert!(list.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}
