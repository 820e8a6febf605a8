//! `ckpt-format` <- `ckpt-engine`, `transport` <- `coordinator` <- `node` <- `cli`: a lower crate
//! never learns of a higher one, and nothing uses the tests.

use crate::tree::{assert_none, root, texts};

/// Each crate with those of ours that it may depend on.
const LAYERS: &[(&str, &[&str])] = &[
    ("ckpt-format", &[]),
    ("ckpt-engine", &["ckpt-format"]),
    ("transport", &["ckpt-format"]),
    ("coordinator", &["ckpt-format", "transport"]),
    ("node", &["ckpt-format", "ckpt-engine", "transport", "coordinator"]),
    ("cli", &["ckpt-format", "ckpt-engine", "transport", "coordinator", "node"]),
    ("chaos-tests", &["ckpt-format", "ckpt-engine", "transport", "coordinator", "node"]),
    (
        "bench",
        &["ckpt-format", "ckpt-engine", "transport", "coordinator", "node", "cli", "chaos-tests"],
    ),
    ("tests/tidy", &[]),
];

#[test]
fn a_crate_depends_only_on_lower_crates() {
    let mut problems = Vec::new();
    for (name, allowed) in LAYERS {
        let manifest = std::fs::read_to_string(root().join(name).join("Cargo.toml"))
            .unwrap_or_else(|error| panic!("{name}/Cargo.toml: {error}"));
        for (other, _) in LAYERS {
            let uses = manifest.lines().any(|line| {
                line.starts_with(&format!("{other}.")) || line.starts_with(&format!("{other} "))
            });
            if uses && !allowed.contains(other) {
                problems.push(format!("{name} depends on {other}"));
            }
        }
    }
    assert_none(&problems, "dependencies against the layers");
}

#[test]
fn every_crate_is_in_the_table() {
    let known: Vec<_> = LAYERS.iter().map(|(name, _)| format!("{name}/Cargo.toml")).collect();
    let mut problems = Vec::new();
    for manifest in texts(&["/Cargo.toml"]) {
        if !known.contains(&manifest.path) {
            problems.push(manifest.path);
        }
    }
    assert_none(&problems, "crates without a layer (add them to LAYERS and ARCHITECTURE.md)");
}

#[test]
fn no_crate_uses_wildcard_versions() {
    let mut problems = Vec::new();
    for manifest in texts(&["Cargo.toml"]) {
        for (number, line) in manifest.content.lines().enumerate() {
            if line.contains("= \"*\"") {
                problems.push(format!("{}:{}: {line}", manifest.path, number + 1));
            }
        }
    }
    assert_none(&problems, "dependencies on any version");
}
