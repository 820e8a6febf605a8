//! What no file of the repository may contain, and how long a source file may grow.

use crate::tree::{assert_none, texts};

const LINES_MAX: usize = 600;

/// Marks of unfinished or hidden work, and places that exist on one machine only. They are
/// written in pieces so that this list does not find itself.
const FORBIDDEN: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("#[ig", "nore"),
    concat!("/wo", "rk/"),
    concat!("issue", " #"),
    concat!("iss", "ues/"),
    concat!("dbg", "!("),
];

#[test]
fn no_file_has_forbidden_words() {
    let mut problems = Vec::new();
    for text in texts(&[".rs", ".md", ".toml", ".sh", ".service", "Makefile", ".ci/run"]) {
        for (index, line) in text.content.lines().enumerate() {
            for word in FORBIDDEN {
                if line.contains(word) {
                    problems.push(format!("{}:{}: {word}", text.path, index + 1));
                }
            }
        }
    }
    assert_none(&problems, "forbidden words");
}

#[test]
fn no_source_file_is_longer_than_a_reader_can_hold() {
    let mut problems = Vec::new();
    for text in texts(&[".rs"]) {
        let lines = text.content.lines().count();
        if lines > LINES_MAX {
            problems.push(format!("{}: {lines} lines, at most {LINES_MAX}", text.path));
        }
    }
    assert_none(&problems, "files to split");
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let mut problems = Vec::new();
    for text in texts(&[".rs"]) {
        if !text.content.starts_with("//!") {
            problems.push(text.path);
        }
    }
    assert_none(&problems, "files without a module comment on their first line");
}
