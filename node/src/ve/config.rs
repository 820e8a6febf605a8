//! A VE's configuration file, in OpenVZ's format: `NAME="value"` lines.
//!
//! The file is parsed, never run. Lines that we do not know are kept, and only lines that change
//! are written anew, so that what people and other tools put there survives.

use std::fmt::Write;

/// A configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigFile {
    lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    Setting { key: String, value: String, text: String },
    Other(String),
}

impl ConfigFile {
    /// Reads a file's text. Nothing in it is an error: what is no setting is kept as it is.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().map(|line| match setting(line) {
            Some((key, value)) => Line::Setting { key, value, text: line.to_owned() },
            None => Line::Other(line.to_owned()),
        });
        Self { lines: lines.collect() }
    }

    /// The value of a setting; the last line wins.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Setting { key: found, value, .. } if found == key => Some(value.as_str()),
            _ => None,
        })
    }

    /// Sets a value, in place if there is a line for it.
    pub fn set(&mut self, key: &str, value: &str) {
        // What would end the quotes or the line cannot be in a value.
        let value: String = value.chars().filter(|c| !"\"\n\r".contains(*c)).collect();
        if self.get(key) == Some(&value) {
            return;
        }
        let mut new =
            Some(Line::Setting { key: key.to_owned(), text: format!("{key}=\"{value}\""), value });
        let last = self.lines.iter().rposition(|line| is(line, key));
        match last {
            Some(index) => self.lines.splice(index..=index, new.take()).for_each(drop),
            None => self.lines.extend(new),
        }
    }

    /// Removes a setting.
    pub fn remove(&mut self, key: &str) {
        self.lines.retain(|line| !is(line, key));
    }
}

impl std::fmt::Display for ConfigFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.lines {
            match line {
                Line::Setting { text, .. } | Line::Other(text) => f.write_str(text)?,
            }
            f.write_char('\n')?;
        }
        Ok(())
    }
}

fn is(line: &Line, key: &str) -> bool {
    matches!(line, Line::Setting { key: found, .. } if found == key)
}

fn setting(line: &str) -> Option<(String, String)> {
    let (key, value) = line.trim_start().split_once('=')?;
    let fits = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    if key.is_empty() || !key.chars().all(fits) {
        return None;
    }
    let value = value.trim();
    let value = match value.chars().next() {
        Some(quote @ ('"' | '\'')) => value[1..].split(quote).next().unwrap_or(""),
        // A value without quotes ends at the first blank.
        _ => value.split_whitespace().next().unwrap_or(""),
    };
    Some((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# A comment\nONBOOT=yes\nUNKNOWN='a b' # kept\n\nHOSTNAME=\"web 1\"\nfoo bar\n";

    #[test]
    fn values_are_read_in_all_their_forms() {
        let file = ConfigFile::parse(TEXT);
        let get = |key| file.get(key);
        assert_eq!(get("ONBOOT"), Some("yes"));
        assert_eq!(get("UNKNOWN"), Some("a b"));
        assert_eq!(get("HOSTNAME"), Some("web 1"));
        assert_eq!(get("NAME"), None);
    }

    #[test]
    fn only_touched_lines_change() {
        let mut file = ConfigFile::parse(TEXT);
        assert_eq!(file.to_string(), TEXT);
        file.set("ONBOOT", "yes");
        assert_eq!(file.to_string(), TEXT);
        file.set("HOSTNAME", "db");
        file.set("NAME", "x");
        let expected = TEXT.replace("HOSTNAME=\"web 1\"", "HOSTNAME=\"db\"") + "NAME=\"x\"\n";
        assert_eq!(file.to_string(), expected);
    }

    #[test]
    fn nothing_is_run_or_broken_out_of() {
        let file = ConfigFile::parse("NAME=$(touch /tmp/x)\nA=`id`\n=x\n\"\nB=\"unclosed\nC=\"");
        assert_eq!(file.get("NAME"), Some("$(touch"));
        assert_eq!(file.get("B"), Some("unclosed"));
        let mut file = ConfigFile::default();
        file.set("DESCRIPTION", "a\"\nONBOOT=yes");
        assert_eq!(ConfigFile::parse(&file.to_string()).get("ONBOOT"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_kept(text in "([ -~]{0,30}\n){0,8}") {
            proptest::prop_assert_eq!(ConfigFile::parse(&text).to_string(), text);
        }

        #[test]
        fn what_was_set_is_read_again(value in "[^\"\n\r]{0,40}") {
            let mut file = ConfigFile::default();
            file.set("KEY", &value);
            let again = ConfigFile::parse(&file.to_string());
            proptest::prop_assert_eq!(again.get("KEY").unwrap_or(""), value);
        }
    }
}
