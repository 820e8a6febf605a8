//! What is left of a timer that was read a while ago.

/// What is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// Nanoseconds until the next expiry; 0 for a timer that does not run any more.
    pub(crate) remaining_ns: u64,
    /// How often it has ended since it was read.
    pub(crate) expirations: u64,
}

/// A timer that had `remaining_ns` left, 0 for one that did not run, `elapsed_ns` ago.
///
/// Clocks go on while a VE stands still, so its timers do, too. The time since the reading is
/// negative where the clocks of the VE are a little behind on the target.
pub(crate) fn left(remaining_ns: u64, interval_ns: u64, elapsed_ns: i64) -> Left {
    if remaining_ns == 0 {
        return Left { remaining_ns: 0, expirations: 0 };
    }
    let left = i128::from(remaining_ns) - i128::from(elapsed_ns);
    if left > 0 {
        let remaining_ns = u64::try_from(left).unwrap_or(u64::MAX);
        return Left { remaining_ns, expirations: 0 };
    }
    if interval_ns == 0 {
        return Left { remaining_ns: 0, expirations: 1 };
    }
    let over = u64::try_from(-left).unwrap_or(u64::MAX);
    Left {
        remaining_ns: interval_ns - over % interval_ns,
        expirations: (over / interval_ns).saturating_add(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(remaining: u64, interval: u64, elapsed: i64, expected: (u64, u64)) {
        let Left { remaining_ns, expirations } = left(remaining, interval, elapsed);
        assert_eq!((remaining_ns, expirations), expected, "{remaining} {interval} {elapsed}");
    }

    #[test]
    fn a_timer_ends_when_it_would_have_ended() {
        check(100, 0, 30, (70, 0));
        check(100, 0, -30, (130, 0));
        check(100, 0, 100, (0, 1));
        check(100, 0, 500, (0, 1));
        check(0, 50, 500, (0, 0));
        check(0, 0, -5, (0, 0));
    }

    #[test]
    fn a_periodic_timer_keeps_its_beat() {
        check(20, 50, 10, (10, 0));
        check(20, 50, 20, (50, 1));
        check(20, 50, 30, (40, 1));
        check(20, 50, 175, (45, 4));
        check(1, 1, i64::MAX, (1, i64::MAX.unsigned_abs()));
    }
}
