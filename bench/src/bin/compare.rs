//! Compares what two revisions came to, figure by figure.
//!
//! A difference counts when the interval of the ratio of the medians (95 %, by drawing the
//! measurements again) leaves out 1, and the ratio is further from 1 than `--least`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use bench::measure::statistics::{median, ratio_interval};
use bench::show::outcome::{Figure, Outcome};
use bench::show::table::{Table, maybe};
use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Compares what two revisions came to.
#[derive(Debug, Parser)]
struct Arguments {
    /// Files of figures of the old revision.
    #[arg(long, num_args = 1.., required = true)]
    old: Vec<PathBuf>,
    /// Files of figures of the new one.
    #[arg(long, num_args = 1.., required = true)]
    new: Vec<PathBuf>,
    /// Smaller differences do not matter.
    #[arg(long, default_value_t = 0.03)]
    least: f64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Why nothing can be compared.
#[derive(Debug, thiserror::Error)]
enum CompareError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} has no figures of a benchmark", path.display())]
    Figures {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Better,
    Worse,
    Same,
}

#[derive(Debug, serde::Serialize)]
struct Compared {
    name: String,
    unit: String,
    old: Option<f64>,
    new: Option<f64>,
    interval: Option<(f64, f64)>,
    verdict: Verdict,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match compare(&arguments) {
        Ok(compared) => {
            show(&compared, arguments.json);
            let worse = compared.iter().any(|one| one.verdict == Verdict::Worse);
            if worse { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("compare: {}", chaos_tests::chain(&error));
            ExitCode::from(2)
        }
    }
}

fn compare(arguments: &Arguments) -> Result<Vec<Compared>, CompareError> {
    let (old, new) = (read(&arguments.old)?, read(&arguments.new)?);
    // The same every time: what is compared again must come out again.
    let mut random = StdRng::seed_from_u64(1);
    let mut compared = Vec::new();
    for (name, before) in old {
        let Some(after) = new.get(&name) else { continue };
        let interval = ratio_interval(&before.samples, &after.samples, &mut random);
        compared.push(Compared {
            verdict: judge(interval, before.more_is_better, arguments.least),
            old: median(&before.samples),
            new: median(&after.samples),
            unit: before.unit,
            interval,
            name,
        });
    }
    Ok(compared)
}

fn judge(interval: Option<(f64, f64)>, more_is_better: bool, least: f64) -> Verdict {
    let more = match interval {
        Some((low, _)) if low > 1.0 + least => true,
        Some((_, high)) if high < 1.0 - least => false,
        _ => return Verdict::Same,
    };
    if more == more_is_better { Verdict::Better } else { Verdict::Worse }
}

/// All figures of these files, those of one name put together.
fn read(paths: &[PathBuf]) -> Result<BTreeMap<String, Figure>, CompareError> {
    let mut all: BTreeMap<String, Figure> = BTreeMap::new();
    for path in paths {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CompareError::Read { path: path.clone(), source })?;
        let outcome: Outcome = serde_json::from_str(&text)
            .map_err(|source| CompareError::Figures { path: path.clone(), source })?;
        for figure in outcome.figures {
            let name = format!("{}: {}", outcome.program, figure.name);
            match all.get_mut(&name) {
                Some(there) => there.samples.extend(figure.samples),
                None => drop(all.insert(name, figure)),
            }
        }
    }
    Ok(all)
}

fn show(compared: &[Compared], json: bool) {
    if json {
        println!("{}", serde_json::to_string(compared).expect("plain data"));
        return;
    }
    let head = ["figure", "unit", "old", "new", "new ÷ old, 95 %", ""];
    let mut table = Table::new("Medians of both revisions", &head);
    for one in compared {
        let interval = one.interval.map(|(low, high)| format!("{low:.2} … {high:.2}"));
        let verdict = match one.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Same => "no difference",
        };
        table.row([
            one.name.clone(),
            one.unit.clone(),
            maybe(one.old),
            maybe(one.new),
            interval.unwrap_or_default(),
            verdict.to_owned(),
        ]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sure_difference_counts() {
        assert_eq!(judge(Some((0.9, 1.2)), false, 0.03), Verdict::Same);
        assert_eq!(judge(Some((1.01, 1.02)), false, 0.03), Verdict::Same);
        assert_eq!(judge(Some((1.1, 1.2)), false, 0.03), Verdict::Worse);
        assert_eq!(judge(Some((1.1, 1.2)), true, 0.03), Verdict::Better);
        assert_eq!(judge(Some((0.5, 0.9)), false, 0.03), Verdict::Better);
        assert_eq!(judge(None, false, 0.03), Verdict::Same);
    }
}
