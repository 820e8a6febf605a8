//! Where the time of a blackout went, as the daemons log it step by step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

/// Milliseconds by part and step, as in `rebuild: files`.
pub type Laps = BTreeMap<String, f64>;

/// The logs of the nodes, from a moment on.
#[derive(Debug)]
pub struct LogMark(Vec<(PathBuf, u64)>);

impl LogMark {
    /// From now on.
    pub fn set(logs: impl IntoIterator<Item = PathBuf>) -> Self {
        let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |data| data.len());
        Self(logs.into_iter().map(|path| (path.clone(), length(&path))).collect())
    }

    /// All that was logged since then.
    pub fn text(&self) -> io::Result<String> {
        let mut text = String::new();
        for (path, from) in &self.0 {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(*from))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        Ok(text)
    }
}

/// The steps in a text of logs. A part that was done again counts as the last time.
pub fn parse(text: &str) -> Laps {
    let mut laps = Laps::new();
    for line in text.lines() {
        let Some((before, steps)) = line.split_once(" of a VE, ms: ") else { continue };
        let part = before.rsplit(' ').next().unwrap_or_default();
        for step in steps.split(", ") {
            if let Some((name, ms)) = step.trim_end_matches("\u{1b}[0m").rsplit_once(' ')
                && let Ok(ms) = ms.parse()
            {
                laps.insert(format!("{part}: {name}"), ms);
            }
        }
    }
    laps
}

/// What the steps that follow each other add up to.
pub fn explained(laps: &Laps) -> f64 {
    // The release is told twice: by its steps, and as a part of the switch. What is done beside
    // others is a part of the step that waits for all of them.
    let again = |name: &str| name.starts_with("release: ") || name.starts_with("beside: ");
    laps.iter().filter(|(name, _)| !again(name)).map(|(_, ms)| ms).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_found_in_a_log() {
        let laps = parse(
            "2026 INFO node::stopwatch: rest of a VE, ms: files 0.50, packet filter 2.00\n\
             other, ms: 1\n2026 INFO switch of a VE, ms: commit 1.00, release 3.00\n\
             release of a VE, ms: thaw 3.00\nbeside of a VE, ms: memory 0.30\n",
        );
        assert_eq!(laps.len(), 6);
        assert_eq!(laps["rest: packet filter"], 2.0);
        assert_eq!(explained(&laps), 6.5);
    }
}
