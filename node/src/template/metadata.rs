//! What a template is made of.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::{TemplateError, failed};

/// The templates that come with the program.
const SHIPPED: &[(&str, &str)] = &[
    ("busybox", include_str!("../../../templates/busybox.toml")),
    ("debian-12", include_str!("../../../templates/debian-12.toml")),
    ("debian-12-minimal", include_str!("../../../templates/debian-12-minimal.toml")),
    ("debian-13", include_str!("../../../templates/debian-13.toml")),
];

/// How many templates one may stand on.
const BASES_MAX: usize = 4;

/// What a template is made of.
///
/// One that names another as its `base` has all that this has: its own lists and files come on
/// top, its other values go before.
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
        let table = merged(directory, name, BASES_MAX)?;
        table.try_into().map_err(invalid(name))
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

/// A description with all that it says of its bases.
fn merged(directory: &Path, name: &str, bases: usize) -> Result<Table, TemplateError> {
    let mut own: Table = toml::from_str(&text(directory, name)?).map_err(invalid(name))?;
    let Some(base) = own.remove("base") else {
        return Ok(own);
    };
    let base = base.try_into::<String>().map_err(invalid(name))?;
    if bases == 0 {
        return Err(TemplateError::Bases { name: name.to_owned(), base });
    }
    let mut all = merged(directory, &base, bases - 1)?;
    for (key, value) in own {
        match (all.get_mut(&key), value) {
            (Some(Value::Array(there)), Value::Array(more)) => there.extend(more),
            (Some(Value::Table(there)), Value::Table(more)) => there.extend(more),
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
    Ok(all)
}

fn text(directory: &Path, name: &str) -> Result<String, TemplateError> {
    let unknown = || TemplateError::Unknown { name: name.to_owned() };
    if !is_name(name) {
        return Err(unknown());
    }
    let path = directory.join(format!("{name}.toml"));
    match fs::read_to_string(&path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            let shipped = SHIPPED.iter().find(|(shipped, _)| *shipped == name);
            Ok(shipped.ok_or_else(unknown)?.1.to_owned())
        }
        read => read.map_err(failed("read", &path)),
    }
}

fn invalid(name: &str) -> impl Fn(toml::de::Error) -> TemplateError {
    move |source| TemplateError::Metadata { name: name.to_owned(), source: Box::new(source) }
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

    #[test]
    fn a_template_adds_to_its_base() {
        let directory = tempfile::tempdir().unwrap();
        let text = "base = \"debian-12\"\ndescription = \"web\"\npackages = [\"nginx\"]\n";
        fs::write(directory.path().join("web.toml"), text).unwrap();
        let base = Metadata::find(directory.path(), "debian-12").unwrap();
        let web = Metadata::find(directory.path(), "web").unwrap();
        assert_eq!(web.description, "web");
        assert_eq!(web.packages.last().unwrap(), "nginx");
        assert_eq!(web.packages.len(), base.packages.len() + 1);
        assert_eq!((web.suite, web.files), (base.suite, base.files));
    }

    #[test]
    fn templates_that_stand_on_each_other_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for (name, base) in [("a", "b"), ("b", "a")] {
            let path = directory.path().join(format!("{name}.toml"));
            fs::write(path, format!("base = \"{base}\"\n")).unwrap();
        }
        let problem = Metadata::find(directory.path(), "a").unwrap_err();
        assert!(matches!(problem, TemplateError::Bases { .. }), "{problem}");
    }
}
