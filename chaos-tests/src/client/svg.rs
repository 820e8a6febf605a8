//! Latency over time, as a picture for documents.

use std::fmt::Write;

use super::latency::Series;
use super::plot::{columns, human};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 40.0;

/// The longest latency over time on a logarithmic scale, with a line for each mark.
pub fn picture(series: &Series, marks: &[(f64, String)]) -> String {
    let columns = columns(series, 800);
    let longest = f64::from(columns.iter().copied().max().unwrap_or(0).max(1000));
    let seconds = (series.slices.len() as f64 * Series::SLICE.as_secs_f64()).max(0.001);
    let (low, high) = (100f64.ln(), longest.ln());
    let y = |us: f64| {
        let share = ((us.max(1.0).ln() - low) / (high - low)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    };
    let x = |at: f64| LEFT + at / seconds * (WIDTH - LEFT - 8.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    for us in [100.0, 1e3, 1e4, 1e5, 1e6].into_iter().filter(|us| *us <= longest * 1.05) {
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\" fill=\"#555555\">{4}</text>",
            WIDTH - 8.0,
            y(us),
            LEFT - 6.0,
            y(us) + 4.0,
            human(us)
        );
    }
    let step = seconds / columns.len() as f64;
    let mut path = String::new();
    for (index, us) in columns.iter().enumerate() {
        let (at, height) = (x(index as f64 * step), y(f64::from(*us)));
        let _ = write!(path, "M{at:.1} {:.1}V{height:.1}", HEIGHT - BOTTOM);
    }
    let _ = writeln!(out, "<path d=\"{path}\" stroke=\"#2b6cb0\" stroke-width=\"1.2\"/>");
    for (at, name) in marks {
        let _ = writeln!(
            out,
            "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{1:.1}\" stroke=\"#c05621\" \
             stroke-dasharray=\"3 3\"/><text x=\"{0:.1}\" y=\"{2:.1}\" fill=\"#c05621\">{3}</text>",
            x(*at),
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM + 15.0,
            escape(name)
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555555\">longest answer to a client over \
         {seconds:.0} s</text>\n</svg>",
        HEIGHT - 8.0
    );
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_well_formed() {
        let mut series = Series::default();
        series.add(std::time::Duration::from_secs(1), std::time::Duration::from_millis(3));
        let picture = picture(&series, &[(0.5, "a<b".into())]);
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
        assert!(picture.contains("a&lt;b"));
    }
}
