//! Latency over time, drawn with characters.

use std::fmt::Write;

use super::latency::Series;

/// The longest latency per column of time, on a logarithmic scale, with marks below.
pub fn terminal(series: &Series, marks: &[(f64, String)], width: usize, height: usize) -> String {
    let columns = columns(series, width);
    let longest = columns.iter().copied().max().unwrap_or(0).max(1000);
    let (low, high) = (100f64.ln(), f64::from(longest).ln());
    let eighths = |us: u32| -> usize {
        if us == 0 {
            return 0;
        }
        let share = ((f64::from(us).ln() - low) / (high - low)).clamp(0.0, 1.0);
        ((share * (height * 8) as f64).round() as usize).max(1)
    };
    let mut out = String::new();
    for row in (0..height).rev() {
        let top = (low + (high - low) * (row + 1) as f64 / height as f64).exp();
        let _ = write!(out, "{:>8} ┤", human(top));
        for us in &columns {
            let fill = eighths(*us).saturating_sub(row * 8).min(8);
            out.push([' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][fill]);
        }
        out.push('\n');
    }
    let seconds = series.slices.len() as f64 * Series::SLICE.as_secs_f64();
    let _ = writeln!(out, "{:>8} └{}", "", "─".repeat(columns.len()));
    let mut line = vec![' '; columns.len()];
    for (at, name) in marks {
        let column = (at / seconds.max(0.001) * columns.len() as f64) as usize;
        for (offset, letter) in format!("▲{name}").chars().enumerate() {
            if let Some(place) = line.get_mut(column + offset) {
                *place = letter;
            }
        }
    }
    let _ = writeln!(out, "{:>9} {}", "", line.into_iter().collect::<String>().trim_end());
    let _ = writeln!(
        out,
        "{:>9} longest answer per {:.1} s, over {seconds:.0} s",
        "",
        seconds / columns.len().max(1) as f64
    );
    out
}

/// The longest latency in microseconds for each of at most `width` equal stretches of time.
pub(crate) fn columns(series: &Series, width: usize) -> Vec<u32> {
    let count = series.slices.len().min(width).max(1);
    let mut columns = vec![0; count];
    for (index, slice) in series.slices.iter().enumerate() {
        let column = index * count / series.slices.len();
        columns[column] = columns[column].max(slice.longest_us);
    }
    columns
}

/// A latency with a unit a person would use.
pub(crate) fn human(us: f64) -> String {
    if us < 1000.0 {
        format!("{us:.0} µs")
    } else if us < 10_000.0 {
        format!("{:.1} ms", us / 1e3)
    } else if us < 1e6 {
        format!("{:.0} ms", us / 1e3)
    } else {
        format!("{:.1} s", us / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stall_stands_out() {
        let mut series = Series::default();
        for ms in 0..1000 {
            let latency = if ms == 500 { 50_000 } else { 200 };
            series.add(Duration::from_millis(ms), Duration::from_micros(latency));
        }
        let plot = terminal(&series, &[(0.5, "move".into())], 50, 4);
        let first = plot.lines().next().unwrap();
        assert_eq!(first.matches('█').count(), 1, "{plot}");
        assert!(plot.contains("▲move"), "{plot}");
    }

    #[test]
    fn nothing_measured_is_drawn_as_nothing() {
        assert!(terminal(&Series::default(), &[], 80, 3).contains('┤'));
    }
}
