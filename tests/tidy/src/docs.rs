//! Every document can be reached from the README or another document, and every relative link
//! leads to a file.

use std::path::{Component, Path, PathBuf};

use crate::tree::{Text, assert_none, root, texts};

#[test]
fn relative_links_lead_somewhere() {
    let mut problems = Vec::new();
    for text in texts(&[".md"]) {
        for link in links(&text) {
            if !root().join(&link).exists() {
                problems.push(format!("{}: {}", text.path, link.display()));
            }
        }
    }
    assert_none(&problems, "dead links");
}

#[test]
fn every_document_is_linked() {
    let all = texts(&[".md"]);
    let linked: Vec<PathBuf> = all.iter().flat_map(links).collect();
    let mut problems = Vec::new();
    for text in &all {
        let entry = text.path == "README.md";
        if !entry && !linked.iter().any(|link| link == Path::new(&text.path)) {
            problems.push(text.path.clone());
        }
    }
    assert_none(&problems, "documents that nothing links to");
}

/// The relative links of a document, as paths from the repository's root.
fn links(text: &Text) -> Vec<PathBuf> {
    let folder = Path::new(&text.path).parent().unwrap_or(Path::new(""));
    let mut found = Vec::new();
    for piece in text.content.split("](").skip(1) {
        let link = piece.split([')', '#', ' ']).next().unwrap_or_default();
        if link.is_empty() || link.contains("://") || link.starts_with("mailto:") {
            continue;
        }
        found.push(normal(&folder.join(link)));
    }
    found
}

fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}
