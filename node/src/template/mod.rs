//! OS templates: building their caches from packages and unpacking them as shared layers.
//!
//! In the template directory, which several daemons of one machine may share:
//! `cache/NAME.toml` says which archive a template's cache is; `archive/DIGEST.tar.zst` are the
//! archives by the BLAKE3 digest of their bytes; `lower/DIGEST` is an archive unpacked, the
//! layer below all VEs made from it; `users/DIGEST/…` has a file for every VE that uses it.
//! A file or directory there is complete once it has its name. `NAME.toml` right in the
//! template directory replaces or adds a template's [`Metadata`].

mod archive;
mod build;
mod metadata;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

pub use archive::Import;
pub use metadata::Metadata;

use crate::{api::Sink, config::Config};

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is no template of that name.
    #[error("there is no OS template {name}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// There is no cache of that template.
    #[error("the OS template {name} is not cached")]
    NotCached {
        /// The name.
        name: String,
    },
    /// The template's description cannot be used.
    #[error("the OS template {name} is not valid")]
    Metadata {
        /// The name.
        name: String,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// Templates stand on each other in a circle, or too many of them.
    #[error("the OS template {name} stands on too many others, of which {base} is one")]
    Bases {
        /// The template.
        name: String,
        /// What it stands on.
        base: String,
    },
    /// A file of the template directory cannot be used.
    #[error("cannot {act} {path}")]
    File {
        /// What was to be done.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program that builds templates cannot be run.
    #[error("cannot run {program}")]
    Program {
        /// The program.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The build failed.
    #[error("building {name} failed; the last it said was:\n{last}")]
    Build {
        /// The template.
        name: String,
        /// The end of what mmdebstrap said.
        last: String,
    },
    /// An archive is not what its digest says.
    #[error("the archive is {found}, not {expected}")]
    Digest {
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// An archive is needed and not there.
    #[error("there is no archive {digest}")]
    NoArchive {
        /// Its digest.
        digest: Digest,
    },
}

/// The BLAKE3 digest of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.into())
    }
}

/// A built cache of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// Its archive.
    pub digest: Digest,
    /// The size of the archive in bytes.
    pub size_bytes: u64,
    /// When it was built, in seconds since 1970.
    pub built_s: u64,
}

/// A template as `vzpkg list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// What it is.
    pub description: String,
    /// Its cache, when there is one.
    pub cache: Option<Cache>,
}

/// The templates of this node.
#[derive(Clone, Debug)]
pub struct Templates {
    directory: PathBuf,
    network_namespace: Option<PathBuf>,
    /// Tells this daemon's VEs from those of others that share the directory.
    user: String,
}

impl Templates {
    /// The templates in the configured directory.
    pub fn new(config: &Config) -> Self {
        let own = blake3::hash(config.state_dir.as_os_str().as_encoded_bytes());
        Self {
            directory: config.template_dir(),
            network_namespace: config.template.network_namespace.clone(),
            user: hex::encode(&own.as_bytes()[..8]),
        }
    }

    /// What a template is made of.
    pub fn metadata(&self, name: &str) -> Result<Metadata, TemplateError> {
        Metadata::find(&self.directory, name)
    }

    /// A template's cache.
    pub fn cache(&self, name: &str) -> Result<Option<Cache>, TemplateError> {
        if !metadata::is_name(name) {
            return Err(TemplateError::Unknown { name: name.to_owned() });
        }
        let path = self.path(&["cache", &format!("{name}.toml")]);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("read", &path)(source)),
        };
        let invalid =
            |source| TemplateError::Metadata { name: name.to_owned(), source: Box::new(source) };
        toml::from_str(&text).map(Some).map_err(invalid)
    }

    /// A template's cache, built now if it is missing.
    pub fn cached(&self, name: &str, sink: &Sink) -> Result<Cache, TemplateError> {
        if let Some(cache) = self.cache(name)? {
            return Ok(cache);
        }
        let metadata = self.metadata(name)?;
        let _lock = self.lock(name)?;
        // Another daemon may have built it while we waited for the lock.
        match self.cache(name)? {
            Some(cache) => Ok(cache),
            None => self.build(name, &metadata, sink),
        }
    }

    /// Builds a template's cache from the packages of today.
    pub fn update(&self, name: &str, sink: &Sink) -> Result<Cache, TemplateError> {
        let metadata = self.metadata(name)?;
        let _lock = self.lock(name)?;
        let old = self.cache(name)?;
        let new = self.build(name, &metadata, sink)?;
        if let Some(old) = old.filter(|old| old.digest != new.digest) {
            self.collect(&old.digest)?;
        }
        Ok(new)
    }

    /// Forgets a template's cache. Its files stay for as long as a VE uses them.
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        let _lock = self.lock(name)?;
        let Some(cache) = self.cache(name)? else {
            return Err(TemplateError::NotCached { name: name.to_owned() });
        };
        let path = self.path(&["cache", &format!("{name}.toml")]);
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        self.collect(&cache.digest)
    }

    /// All templates, by name.
    pub fn list(&self) -> Result<Vec<Listed>, TemplateError> {
        let listed = Metadata::names(&self.directory).into_iter().map(|name| {
            let description = self.metadata(&name)?.description;
            Ok(Listed { cache: self.cache(&name)?, name, description })
        });
        listed.collect()
    }

    /// True if the layer or the archive that it comes from is here.
    pub fn has(&self, digest: &Digest) -> bool {
        self.lower(digest).is_dir() || self.archive(digest).is_file()
    }

    /// The layer below a VE's files, unpacked now if it is not yet. The VE is noted as a user
    /// until [`Templates::give_back`].
    pub fn take(&self, digest: &Digest, ve: u32, sink: &Sink) -> Result<PathBuf, TemplateError> {
        let _lock = self.lock(&digest.to_string())?;
        let note = self.note(digest, ve);
        make(note.parent().expect("it has one"))?;
        fs::write(&note, "").map_err(failed("write", &note))?;
        let taken = self.unpacked(digest, sink);
        if taken.is_err() {
            let _ = fs::remove_file(&note);
        }
        taken
    }

    /// A VE no longer uses a layer. One that nothing uses or names is removed.
    pub fn give_back(&self, digest: &Digest, ve: u32) -> Result<(), TemplateError> {
        let note = self.note(digest, ve);
        match fs::remove_file(&note) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &note)(source));
            }
            _ => (),
        }
        self.collect(digest)
    }

    /// Removes a layer and its archive if no template names it and no VE uses it.
    fn collect(&self, digest: &Digest) -> Result<(), TemplateError> {
        let _lock = self.lock(&digest.to_string())?;
        for name in Metadata::names(&self.directory) {
            if self.cache(&name)?.is_some_and(|cache| cache.digest == *digest) {
                return Ok(());
            }
        }
        let users = self.path(&["users", &digest.to_string()]);
        if fs::read_dir(&users).is_ok_and(|mut users| users.next().is_some()) {
            return Ok(());
        }
        for path in [users, self.lower(digest)] {
            match fs::remove_dir_all(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(source));
                }
                _ => (),
            }
        }
        match fs::remove_file(self.archive(digest)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &self.archive(digest))(source))
            }
            _ => Ok(()),
        }
    }

    fn note(&self, digest: &Digest, ve: u32) -> PathBuf {
        self.path(&["users", &digest.to_string(), &format!("{}-{ve}", self.user)])
    }

    fn lower(&self, digest: &Digest) -> PathBuf {
        self.path(&["lower", &digest.to_string()])
    }

    fn archive(&self, digest: &Digest) -> PathBuf {
        self.path(&["archive", &format!("{digest}.tar.zst")])
    }

    fn path(&self, parts: &[&str]) -> PathBuf {
        let mut path = self.directory.clone();
        path.extend(parts);
        path
    }

    /// Held while something of that name is made, against other threads and daemons.
    fn lock(&self, name: &str) -> Result<Flock<File>, TemplateError> {
        let path = self.path(&["lock", name]);
        make(path.parent().expect("it has one"))?;
        let file = File::create(&path).map_err(failed("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, source)| failed("lock", &path)(source.into()))
    }
}

fn make(directory: &Path) -> Result<(), TemplateError> {
    fs::create_dir_all(directory).map_err(failed("make", directory))
}

fn failed<'a>(act: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> TemplateError + 'a {
    move |source| TemplateError::File { act, path: path.into(), source }
}
