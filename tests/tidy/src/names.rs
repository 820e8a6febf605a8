//! Where a library, a keyword or a clock may be named. What is contained can be replaced.

use crate::tree::{Text, assert_none, texts};

/// A word that only some files may use.
struct Fence {
    /// The word as it stands in code, not inside a longer word.
    word: &'static str,
    /// Files that may use it: paths that start with, or end with, one of these.
    inside: &'static [&'static str],
}

const FENCES: &[Fence] = &[
    Fence { word: "quinn", inside: &["transport/src/"] },
    Fence { word: "openraft", inside: &["coordinator/src/raft/", "coordinator/src/raft.rs"] },
    Fence { word: "bincode", inside: &["/codec.rs"] },
    Fence { word: "ciborium", inside: &["/codec.rs"] },
    Fence { word: "redb", inside: &["coordinator/src/", "node/src/"] },
    Fence { word: "unsafe", inside: &["ckpt-engine/src/sys/"] },
];

/// What a pure module may not name: the world outside, and time that is not an argument.
const WORLD: &[&str] = &[
    "tokio",
    "Instant::now",
    "SystemTime::now",
    "std::fs",
    "fs::read",
    "net::TcpStream",
    "net::TcpListener",
    "net::UdpSocket",
    "std::process",
];

/// Files that promise to be pure.
const PURE: &[&str] = &["ckpt-format/src/", "coordinator/src/core/", "coordinator/src/state"];

#[test]
fn libraries_and_keywords_stay_behind_their_fences() {
    let mut problems = Vec::new();
    for text in sources() {
        for fence in FENCES {
            let allowed = fence
                .inside
                .iter()
                .any(|place| text.path.starts_with(place) || text.path.ends_with(place));
            if !allowed {
                report(&text, fence.word, &mut problems);
            }
        }
    }
    assert_none(&problems, "words outside their fence");
}

#[test]
fn pure_modules_touch_no_world() {
    let mut problems = Vec::new();
    for text in sources() {
        if PURE.iter().any(|place| text.path.starts_with(place)) {
            for word in WORLD {
                report(&text, word, &mut problems);
            }
        }
    }
    assert_none(&problems, "pure modules that touch the world");
}

#[test]
fn crates_without_kernel_calls_forbid_unsafe_code() {
    let mut problems = Vec::new();
    for path in ["ckpt-format/src/lib.rs", "transport/src/lib.rs", "coordinator/src/lib.rs"] {
        let forbids = sources()
            .iter()
            .any(|text| text.path == path && text.content.contains("#![forbid(unsafe_code)]"));
        if !forbids {
            problems.push(path.to_owned());
        }
    }
    assert_none(&problems, "crates that must forbid unsafe code");
}

fn sources() -> Vec<Text> {
    let mut found = texts(&[".rs"]);
    found.retain(|text| !text.path.starts_with("tests/tidy/"));
    found
}

fn report(text: &Text, word: &str, problems: &mut Vec<String>) {
    // Tests inside a module may use what they need to prove it.
    let tests_start = text.content.find("#[cfg(test)]").unwrap_or(text.content.len());
    let tests_line = text.content.get(..tests_start).unwrap_or_default().lines().count() + 1;
    for (number, line) in text.code_lines() {
        if number < tests_line && has_word(line, word) {
            problems.push(format!("{}:{number}: {word}", text.path));
        }
    }
}

/// Whether the line has the word outside string literals and not inside a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let code: String = line.split('"').step_by(2).collect::<Vec<_>>().join("\"\"");
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !joins(before) && !joins(after)
    })
}

#[test]
fn the_word_finder_finds_whole_words_only() {
    assert!(has_word("use quinn::Endpoint;", "quinn"));
    assert!(has_word("    unsafe { x }", "unsafe"));
    assert!(!has_word("#![forbid(unsafe_code)]", "unsafe"));
    assert!(!has_word("let quinns = 1;", "quinn"));
    assert!(!has_word("say(\"unsafe\")", "unsafe"));
}
