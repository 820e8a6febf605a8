//! What a template is made of.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{TemplateError, failed};

/// The templates that come with the program.
const SHIPPED: &[(&str, &str)] = &[
    ("busybox", include_str!("../../../templates/busybox.toml")),
    ("debian-12", include_str!("../../../templates/debian-12.toml")),
    ("debian-12-minimal", include_str!("../../../templates/debian-12-minimal.toml")),
    ("debian-13", include_str!("../../../templates/debian-13.toml")),
];

/// What a template is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// What it is, in one line.
    pub description: String,
    /// The Debian suite.
    pub suite: String,
    /// mmdebstrap's variant: which packages every such template has.
    pub variant: String,
    /// The packages beside them.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Shell commands to run inside when all packages are set up.
    #[serde(default)]
    pub commands: Vec<String>,
    /// Files to put there after that, by path.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// The file that exists once the boot of a VE is complete.
    #[serde(default)]
    pub ready_file: Option<String>,
    /// A shell script that succeeds inside once the boot of a VE is complete.
    #[serde(default)]
    pub ready_command: Option<String>,
    /// Whether a VE has a `/dev/console`: one that takes everything and says nothing.
    #[serde(default = "yes")]
    pub console: bool,
    /// What runs `commands`.
    #[serde(default = "usual_shell")]
    pub shell: String,
}

fn yes() -> bool {
    true
}

fn usual_shell() -> String {
    "sh".to_owned()
}

impl Metadata {
    /// The description of a template: one in the template directory goes before ours.
    pub(super) fn find(directory: &Path, name: &str) -> Result<Self, TemplateError> {
        let unknown = || TemplateError::Unknown { name: name.to_owned() };
        if !is_name(name) {
            return Err(unknown());
        }
        let path = directory.join(format!("{name}.toml"));
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                let shipped = SHIPPED.iter().find(|(shipped, _)| *shipped == name);
                shipped.ok_or_else(unknown)?.1.to_owned()
            }
            Err(source) => return Err(failed("read", &path)(source)),
        };
        toml::from_str(&text).map_err(|source| TemplateError::Metadata {
            name: name.to_owned(),
            source: Box::new(source),
        })
    }

    /// The names of all templates.
    pub(super) fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = SHIPPED.iter().map(|(name, _)| (*name).to_owned()).collect();
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".toml"))
                && is_name(name)
            {
                names.push(name.to_owned());
            }
        }
        names.sort();
        names.dedup();
        names
    }
}

/// A name that can be a file's.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() < 100 && !name.starts_with('.') && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_templates_are_valid() {
        for (name, _) in SHIPPED {
            Metadata::find(Path::new("/nowhere"), name).unwrap();
        }
    }

    #[test]
    fn a_name_is_no_path() {
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b"] {
            let problem = Metadata::find(Path::new("/"), name).unwrap_err();
            assert!(matches!(problem, TemplateError::Unknown { .. }), "{name}");
        }
    }
}
