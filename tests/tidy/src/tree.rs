//! The repository's own files, as text.

use std::fs;
use std::path::{Path, PathBuf};

/// A text file of the repository, with its path as written from the root.
pub(crate) struct Text {
    /// The path from the repository's root, with `/`.
    pub(crate) path: String,
    /// The whole content.
    pub(crate) content: String,
}

impl Text {
    /// The lines that are code: without comments, each with its number.
    pub(crate) fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.content
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line.split("//").next().unwrap_or(line)))
    }
}

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("this crate lies two levels below the root").to_path_buf()
}

/// Every file with one of these endings, sorted by path.
pub(crate) fn texts(endings: &[&str]) -> Vec<Text> {
    let mut found = Vec::new();
    walk(&root(), "", &mut |path| {
        if endings.iter().any(|ending| path.ends_with(ending)) {
            let content = fs::read_to_string(root().join(path)).expect("our own files are UTF-8");
            found.push(Text { path: path.to_owned(), content });
        }
    });
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(
        !found.is_empty(),
        "no files like {endings:?} found: the test looks in the wrong place"
    );
    found
}

/// Fails with one line for each problem.
pub(crate) fn assert_none(problems: &[String], what: &str) {
    assert!(problems.is_empty(), "{what}:\n  {}", problems.join("\n  "));
}

fn walk(folder: &Path, prefix: &str, visit: &mut impl FnMut(&str)) {
    for entry in fs::read_dir(folder).expect("the repository can be read") {
        let entry = entry.expect("the repository can be read");
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        let kind = entry.file_type().expect("the file system tells types");
        if kind.is_dir() {
            let built = prefix.is_empty() && name.starts_with("target");
            if name != ".git" && !built {
                walk(&entry.path(), &format!("{path}/"), visit);
            }
        } else if kind.is_file() {
            visit(&path);
        }
    }
}
