//! What a member keeps on the disk, in one directory that is swapped whole.
//!
//! | file | what |
//! |---|---|
//! | `member.json` | who this node is, and where it listens |
//! | `log.redb` | the replicated log |
//! | `ca.crt`, `node.crt`, `node.key` | the cluster's authority, and what this node proves itself with |
//! | `ca.key` | the authority's key, so that any member can let others in |

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};
use transport::NodeId;

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The cluster's id.
    pub cluster: String,
    /// Its number in it.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where it listens; nowhere while it is alone.
    pub address: Option<SocketAddr>,
}

/// Why the files of the membership cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file or directory cannot be read or written.
    #[error("cannot access {}", path.display())]
    Access {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

fn access(path: &Path) -> impl FnOnce(io::Error) -> FilesError + use<'_> {
    move |source| FilesError::Access { path: path.into(), source }
}

/// The directory of a membership.
#[derive(Debug, Clone)]
pub(super) struct Directory(PathBuf);

impl Directory {
    /// The directory in use.
    pub(super) fn current(state: &Path) -> Self {
        Self(state.join("cluster"))
    }

    /// A fresh, empty one that may become the current one.
    pub(super) fn prepare(state: &Path) -> Result<Self, FilesError> {
        let path = state.join("cluster.new");
        remove(&path)?;
        make(&path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn log(&self) -> PathBuf {
        self.0.join("log.redb")
    }

    /// The member this directory is of, if it is of any.
    pub(super) fn member(&self) -> Result<Option<Member>, FilesError> {
        let path = self.0.join("member.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FilesError::Access { path, source }),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| FilesError::Damaged { path, source })
    }

    /// Writes down who the member is; whole or not at all.
    pub(super) fn set_member(&self, member: &Member) -> Result<(), FilesError> {
        make(&self.0)?;
        let path = self.0.join("member.json");
        let temporary = self.0.join("member.json.new");
        let text = serde_json::to_vec_pretty(member)
            .map_err(|source| FilesError::Damaged { path: path.clone(), source })?;
        let write = || {
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            std::fs::File::open(&self.0)?.sync_all()
        };
        write().map_err(access(&path))
    }

    /// Makes this prepared directory the current one, in one step that a crash cannot halve.
    /// What was current before is gone afterwards.
    pub(super) fn install(self, state: &Path) -> Result<Self, FilesError> {
        let current = Self::current(state);
        renameat2(AT_FDCWD, &self.0, AT_FDCWD, &current.0, RenameFlags::RENAME_EXCHANGE)
            .map_err(io::Error::from)
            .and_then(|()| std::fs::File::open(state)?.sync_all())
            .map_err(access(&current.0))?;
        if let Err(error) = remove(&self.0) {
            // Harmless: the next one to prepare a directory removes it.
            tracing::warn!(error = crate::api::chain(&error), "left behind");
        }
        Ok(current)
    }
}

fn make(path: &Path) -> Result<(), FilesError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(access(path))
}

fn remove(path: &Path) -> Result<(), FilesError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FilesError::Access { path: path.into(), source: error })
        }
        _ => Ok(()),
    }
}
