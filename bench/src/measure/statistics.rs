//! What a handful of measurements says, and whether two handfuls differ.

use rand::Rng;

/// The middle one; of none, none.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The value that this share of all does not exceed, between two neighbours where it falls
/// between them.
pub fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let at = share.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// How often the measurements are drawn again.
const DRAWS: usize = 2000;
/// Fewer measurements say nothing about how they vary.
const LEAST: usize = 3;

/// The interval in which the ratio of two medians, new by old, lies with 95 % confidence: the
/// measurements are drawn again with replacement and the middle 95 % of the ratios are kept.
pub fn ratio_interval(old: &[f64], new: &[f64], random: &mut impl Rng) -> Option<(f64, f64)> {
    let mut draw = |values: &[f64]| {
        let drawn: Vec<f64> =
            (0..values.len()).map(|_| values[random.random_range(0..values.len())]).collect();
        median(&drawn)
    };
    if old.len() < LEAST || new.len() < LEAST {
        return None;
    }
    let mut ratios = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        let (before, after) = (draw(old)?, draw(new)?);
        if before != 0.0 {
            ratios.push(after / before);
        }
    }
    Some((quantile(&ratios, 0.025)?, quantile(&ratios, 0.975)?))
}

/// The straight line through points, by least squares: where it begins, how it rises, and how
/// much of the variation it explains (R²).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// At zero.
    pub base: f64,
    /// For one more.
    pub slope: f64,
    /// 1 for points on a line.
    pub fit: f64,
}

impl Line {
    /// Through at least two points with different places.
    pub fn through(points: &[(f64, f64)]) -> Option<Self> {
        let count = points.len() as f64;
        let mean = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
        if points.len() < 2 || spread == 0.0 {
            return None;
        }
        let slope = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>() / spread;
        let base = y - slope * x;
        let all: f64 = points.iter().map(|point| (point.1 - y).powi(2)).sum();
        let left: f64 = points.iter().map(|point| (point.1 - base - slope * point.0).powi(2)).sum();
        Some(Self { base, slope, fit: if all == 0.0 { 1.0 } else { 1.0 - left / all } })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(quantile(&[0.0, 10.0], 0.9), Some(9.0));
    }

    #[test]
    fn twice_as_much_is_told_from_noise() {
        let mut random = StdRng::seed_from_u64(1);
        let old: Vec<f64> = (0..20).map(|n| 10.0 + f64::from(n % 5)).collect();
        let twice: Vec<f64> = old.iter().map(|value| value * 2.0).collect();
        let (low, high) = ratio_interval(&old, &twice, &mut random).unwrap();
        assert!(low > 1.5 && high < 2.5, "{low} {high}");
        let (low, high) = ratio_interval(&old, &old, &mut random).unwrap();
        assert!(low <= 1.0 && high >= 1.0, "{low} {high}");
        assert_eq!(ratio_interval(&[1.0, 2.0], &old, &mut random), None);
    }

    #[test]
    fn points_on_a_line_lie_on_it() {
        let line = Line::through(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]).unwrap();
        assert_eq!((line.base, line.slope, line.fit), (1.0, 2.0, 1.0));
        assert_eq!(Line::through(&[(1.0, 1.0), (1.0, 2.0)]), None);
    }
}
