//! All that one run of a benchmark found.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::table::{Table, digits, maybe};
use crate::goals::{Goal, Judged, Side};
use crate::measure::machine::Machine;
use crate::measure::statistics::{median, quantile};

/// Measurements of one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured; the same in every run.
    pub name: String,
    /// In what.
    pub unit: String,
    /// True if more is better.
    pub more_is_better: bool,
    /// What each repetition gave.
    pub samples: Vec<f64>,
}

/// All that one run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The program.
    pub program: String,
    /// Whether it was in a hurry: then the figures say little.
    pub quick: bool,
    /// Where and when.
    pub machine: Machine,
    /// What it measured.
    pub figures: Vec<Figure>,
    /// The same for people.
    pub tables: Vec<Table>,
    /// What was found out by comparison with the goals.
    pub goals: Vec<Judged>,
    /// What else a reader must know.
    pub notes: Vec<String>,
    /// Names of the pictures, with what is in them.
    #[serde(skip)]
    pub pictures: Vec<(String, String)>,
}

impl Outcome {
    /// Nothing found yet.
    pub fn new(program: &str, quick: bool) -> Self {
        Self {
            program: program.to_owned(),
            quick,
            machine: Machine::here(),
            figures: Vec::new(),
            tables: Vec::new(),
            goals: Vec::new(),
            notes: Vec::new(),
            pictures: Vec::new(),
        }
    }

    /// Takes in measurements of which less is better.
    pub fn less(&mut self, name: &str, unit: &str, samples: &[f64]) {
        self.add(name, unit, false, samples);
    }

    /// Takes in measurements of which more is better.
    pub fn more(&mut self, name: &str, unit: &str, samples: &[f64]) {
        self.add(name, unit, true, samples);
    }

    fn add(&mut self, name: &str, unit: &str, more_is_better: bool, samples: &[f64]) {
        if !samples.is_empty() {
            let (name, unit) = (name.to_owned(), unit.to_owned());
            self.figures.push(Figure { name, unit, more_is_better, samples: samples.to_vec() });
        }
    }

    /// Compares with a goal, if there is a figure.
    pub fn judge(&mut self, goal: Goal, value: Option<f64>) {
        self.goals.extend(value.map(|value| goal.judge(value)));
    }

    /// The medians of all figures, as a table.
    pub fn figures_table(&self) -> Table {
        let head = ["figure", "unit", "median", "least", "most", "runs"];
        let mut table = Table::new("Figures", &head);
        for figure in &self.figures {
            table.row([
                figure.name.clone(),
                figure.unit.clone(),
                maybe(median(&figure.samples)),
                maybe(quantile(&figure.samples, 0.0)),
                maybe(quantile(&figure.samples, 1.0)),
                figure.samples.len().to_string(),
            ]);
        }
        table
    }

    fn goals_table(&self) -> Table {
        let mut table = Table::new("Goals", &["goal", "limit", "found", ""]);
        for Judged { what, side, limit, unit, value, met } in &self.goals {
            let sign = if *side == Side::AtMost { "≤" } else { "≥" };
            table.row([
                what.clone(),
                format!("{sign} {} {unit}", digits(*limit)).trim_end().to_owned(),
                digits(*value),
                if *met { "met" } else { "NOT MET" }.to_owned(),
            ]);
        }
        table
    }

    /// Prints all of it: one JSON object, or tables.
    pub fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string(self).expect("plain data"));
            return;
        }
        println!("{}: {}\n", self.program, self.machine);
        for table in &self.tables {
            println!("{table}");
        }
        if !self.goals.is_empty() {
            println!("{}", self.goals_table());
        }
        for note in &self.notes {
            println!("- {note}");
        }
        println!();
    }

    /// Writes the figures and the pictures below a folder of documents, as `figures/NAME.json`
    /// and `pictures/NAME.svg`.
    pub fn keep(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let (figures, pictures) = (folder.join("figures"), folder.join("pictures"));
        fs::create_dir_all(&figures)?;
        fs::create_dir_all(&pictures)?;
        let mut written = vec![figures.join(format!("{}.json", self.program))];
        let mut text = serde_json::to_string_pretty(self).expect("plain data");
        text.push('\n');
        fs::write(&written[0], text)?;
        for (name, picture) in &self.pictures {
            let path = pictures.join(format!("{name}.svg"));
            fs::write(&path, picture)?;
            written.push(path);
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals;

    #[test]
    fn what_is_kept_can_be_read_again() {
        let mut outcome = Outcome::new("test", true);
        outcome.less("stall", "ms", &[1.0, 2.0, 4.0]);
        outcome.judge(goals::IDLE_STALL, Some(2.0));
        outcome.judge(goals::REDIS_STALL, None);
        outcome.pictures.push(("test".into(), "<svg/>".into()));
        let folder = tempfile::tempdir().unwrap();
        let written = outcome.keep(folder.path()).unwrap();
        assert_eq!(written.len(), 2);
        let text = fs::read_to_string(&written[0]).unwrap();
        let read: Outcome = serde_json::from_str(&text).unwrap();
        assert_eq!((read.figures, read.goals.len()), (outcome.figures, 1));
    }
}
