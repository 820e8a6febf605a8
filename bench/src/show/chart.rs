//! Pictures of curves and of where time goes, as SVG.

use std::fmt::Write;

use super::table::digits;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 16.0;
const COLOURS: &[&str] =
    &["#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#4a5568", "#0987a0"];

/// Points that belong together.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What they are.
    pub name: String,
    /// Where they are.
    pub points: Vec<(f64, f64)>,
}

/// Curves over one axis.
pub fn curves(title: &str, x_name: &str, y_name: &str, curves: &[Curve]) -> String {
    const HEIGHT: f64 = 300.0;
    const TOP: f64 = 34.0;
    const BOTTOM: f64 = 44.0;
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let x_max = nice(points().map(|point| point.0).fold(0.0, f64::max));
    let y_max = nice(points().map(|point| point.1).fold(0.0, f64::max));
    let x = |value: f64| LEFT + value / x_max * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / y_max * (HEIGHT - BOTTOM - TOP);
    let legend = 18.0 * curves.len() as f64;
    let mut out = open(title, HEIGHT + legend);
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let (at, low) = (y(y_max * share), HEIGHT - BOTTOM);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555555\">{}</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555555\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            digits(y_max * share),
            x(x_max * share),
            low + 16.0,
            digits(x_max * share),
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555555\">{}</text>\
         <text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555555\">{}</text>",
        (LEFT + WIDTH) / 2.0,
        HEIGHT - BOTTOM + 34.0,
        escape(x_name),
        TOP - 6.0,
        escape(y_name),
    );
    for (number, curve) in curves.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let places: Vec<String> = curve
            .points
            .iter()
            .map(|&(at, value)| format!("{:.1},{:.1}", x(at), y(value)))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            places.join(" ")
        );
        for &(at, value) in &curve.points {
            let _ = write!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                x(at),
                y(value)
            );
        }
        key(&mut out, HEIGHT + 18.0 * number as f64, colour, &curve.name);
    }
    out.push_str("</svg>\n");
    out
}

/// One bar: its name, and the pieces that it is made of.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it is.
    pub name: String,
    /// What each piece is worth, in the order of their names.
    pub pieces: Vec<f64>,
}

/// Bars made of pieces, one below the other.
pub fn bars(title: &str, unit: &str, pieces: &[&str], bars: &[Bar]) -> String {
    const ROW: f64 = 26.0;
    const TOP: f64 = 34.0;
    const NAMES: f64 = 230.0;
    let longest = bars.iter().map(|bar| bar.pieces.iter().sum::<f64>()).fold(0.0, f64::max);
    let scale = (WIDTH - NAMES - 90.0) / longest.max(f64::MIN_POSITIVE);
    let bottom = TOP + ROW * bars.len() as f64;
    let keys = if pieces.len() > 1 { pieces } else { &[] };
    let mut out = open(title, bottom + 18.0 * keys.len() as f64 + 8.0);
    for (row, bar) in bars.iter().enumerate() {
        let top = TOP + ROW * row as f64;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#222222\">{}</text>",
            NAMES - 8.0,
            top + 16.0,
            escape(&bar.name)
        );
        let mut left = NAMES;
        for (number, value) in bar.pieces.iter().enumerate() {
            let width = value.max(0.0) * scale;
            let _ = write!(
                out,
                "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"18\" \
                 fill=\"{}\"/>",
                top + 2.0,
                COLOURS[number % COLOURS.len()]
            );
            left += width;
        }
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#222222\">{} {}</text>",
            left + 6.0,
            top + 16.0,
            digits(bar.pieces.iter().sum()),
            escape(unit)
        );
    }
    for (number, name) in keys.iter().enumerate() {
        key(&mut out, bottom + 18.0 * number as f64 + 14.0, COLOURS[number % COLOURS.len()], name);
    }
    out.push_str("</svg>\n");
    out
}

fn open(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{:.1}\" y=\"16\" text-anchor=\"middle\" font-weight=\"bold\" \
         fill=\"#222222\">{}</text>\n",
        WIDTH / 2.0,
        escape(title)
    )
}

fn key(out: &mut String, y: f64, colour: &str, name: &str) {
    let _ = writeln!(
        out,
        "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
         <text x=\"{:.1}\" y=\"{y:.1}\" fill=\"#222222\">{}</text>",
        y - 10.0,
        LEFT + 18.0,
        escape(name)
    );
}

/// The next larger number that people like on an axis.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|step| *step >= value).unwrap_or(value)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_well_formed() {
        let curve = Curve { name: "a<b".into(), points: vec![(0.0, 1.0), (10.0, 3.0)] };
        let bar = Bar { name: "x".into(), pieces: vec![1.0, 2.0] };
        for picture in [
            curves("t", "x", "y", &[curve]),
            bars("t", "ms", &["one", "two"], &[bar]),
            curves("none", "x", "y", &[]),
        ] {
            assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
            assert!(!picture.contains("NaN") && !picture.contains("a<b"), "{picture}");
        }
    }

    #[test]
    fn axes_end_above_what_they_show() {
        for (value, end) in [(0.0, 1.0), (0.93, 1.0), (11.0, 12.0), (99.0, 100.0), (61.0, 80.0)] {
            assert!((nice(value) - end).abs() < 1e-9, "{value}: {}", nice(value));
        }
    }
}
