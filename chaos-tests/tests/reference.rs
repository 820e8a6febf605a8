//! The reference tells every option that the programs have, and the example configuration holds
//! the defaults that it promises.

use std::path::{Path, PathBuf};
use std::process::Command;

use node::config::Config;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate of the workspace").to_path_buf()
}

/// The long options that a program tells of, its commands' included.
fn options(program: &[&Path], commands: &[&str]) -> Vec<String> {
    let (first, rest) = program.split_first().expect("a program");
    let mut command = Command::new(first);
    let output = command.args(rest).args(commands).arg("--help").output().expect("it was built");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let text = text.split("Example:").next().unwrap_or_default();
    let mut found: Vec<String> = text
        .split(|c: char| c.is_whitespace() || "[],<=".contains(c))
        .filter(|word| word.starts_with("--") && word.len() > 2)
        .map(|word| word.trim_end_matches('.').to_owned())
        .collect();
    let listed = text.split_once("Commands:\n").map(|(_, rest)| rest).unwrap_or_default();
    for line in listed.lines().take_while(|line| line.starts_with("  ")) {
        let verb = line.split_whitespace().next().unwrap_or_default();
        if verb != "help" && !verb.starts_with('-') && line.as_bytes().get(2) != Some(&b' ') {
            found.extend(options(program, &[commands, &[verb]].concat()));
        }
    }
    found.sort();
    found.dedup();
    found
}

#[test]
fn every_option_is_told() {
    let built = Path::new(env!("CARGO_BIN_EXE_testbed")).parent().expect("a folder").to_path_buf();
    let vz = built.join("vz");
    assert!(vz.exists(), "{} is missing: build the workspace first", vz.display());
    let common = ["--help", "--version", "--socket"];
    let mut missing = Vec::new();
    let pages = [
        ("vzctl", "vzctl.md", true),
        ("vzlist", "vzlist.md", true),
        ("vzmigrate", "vzmigrate.md", true),
        ("vzpkg", "vzpkg.md", true),
        ("vzcluster", "vzcluster.md", true),
        ("vzckpt", "vzckpt.md", true),
        ("vznode", "vznode.md", true),
        ("testbed", "testbed.md", false),
        ("selfcheck", "workloads.md", false),
        ("workloads", "workloads.md", false),
        ("loadclient", "workloads.md", false),
        ("demo", "workloads.md", false),
    ];
    for (program, page, is_vz) in pages {
        let page = root().join("docs/reference").join(page);
        let text = std::fs::read_to_string(&page).expect("the page");
        let own = built.join(program);
        let words =
            if is_vz { vec![vz.as_path(), Path::new(program)] } else { vec![own.as_path()] };
        let found = options(&words, &[]);
        assert!(!found.is_empty(), "{program} tells no option");
        for option in found {
            if !common.contains(&option.as_str()) && !text.contains(&option) {
                missing.push(format!("{program} {option} is not in {}", page.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_list_of_workloads_is_that_of_the_code() {
    let page = root().join("docs/reference/objects.md");
    let text = std::fs::read_to_string(&page).expect("the page");
    let renewed = chaos_tests::workload::listing::refreshed(&text).expect("a place for the list");
    assert!(
        text == renewed,
        "renew the list: target/release/selfcheck list --docs docs/reference/objects.md"
    );
}

#[test]
fn the_example_configuration_holds_the_defaults() {
    let example = Config::load(&root().join("packaging/vzd.toml")).expect("the example is valid");
    assert_eq!(example, Config::default());
}

#[test]
fn every_key_of_the_configuration_is_told() {
    let page =
        std::fs::read_to_string(root().join("docs/reference/vzd-toml.md")).expect("the page");
    let value = serde_json::to_value(Config::default()).expect("plain data");
    let mut missing = Vec::new();
    for (key, value) in value.as_object().expect("a table") {
        match value.as_object() {
            None => missing.extend((!page.contains(&format!("`{key}`"))).then(|| key.clone())),
            Some(table) => missing.extend(
                table
                    .keys()
                    .map(|inner| format!("[{key}] {inner}"))
                    .filter(|name| !page.contains(name)),
            ),
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}
