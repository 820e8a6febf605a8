//! What ties a VE to this node: where its files are, and which host ids stand for its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ckpt_engine::container::{ID_COUNT, Layers};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{VeError, VeId};
use crate::template::Digest;

/// What ties a VE to this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The layer below its files.
    pub template: Digest,
    /// Which block of host ids it has.
    pub slot: u32,
}

impl Place {
    /// The host id that root inside stands for.
    pub fn id_base(&self, first: u32) -> u32 {
        first.saturating_add(self.slot.saturating_mul(ID_COUNT))
    }
}

/// The file beside a VE that tells of a move under way.
pub(crate) const MOVE_JOURNAL: &str = "migration.json";

/// The paths of one VE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Paths {
    pub(super) directory: PathBuf,
}

impl Paths {
    pub(super) fn new(state_dir: &Path, id: VeId) -> Self {
        Self { directory: state_dir.join("ve").join(id.to_string()) }
    }

    pub(super) fn config(&self) -> PathBuf {
        self.directory.join("ve.conf")
    }

    pub(super) fn place(&self) -> PathBuf {
        self.directory.join("place.json")
    }

    pub(super) fn running(&self) -> PathBuf {
        self.directory.join("running.json")
    }

    /// Whether a move of it was under way when the last daemon ended.
    pub(super) fn moves(&self) -> bool {
        self.directory.join(MOVE_JOURNAL).exists()
    }

    pub(super) fn layers(&self, lower: PathBuf) -> Layers {
        let store = self.directory.join("store");
        Layers { lower, upper: store.join("upper"), work: store.join("work") }
    }

    /// Makes the directories of a VE without files.
    pub(super) fn make(&self) -> Result<(), VeError> {
        for name in ["store/upper", "store/work"] {
            let path = self.directory.join(name);
            fs::create_dir_all(&path).map_err(VeError::file("make", &path))?;
        }
        // Set-user-id programs of VEs are nobody's business on the host.
        let own = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&self.directory, own).map_err(VeError::file("protect", &self.directory))
    }

    pub(super) fn remove(&self) -> Result<(), VeError> {
        match fs::remove_dir_all(&self.directory) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(VeError::file("remove", &self.directory)(source))
            }
            _ => Ok(()),
        }
    }
}

/// Reads a JSON file; `None` if there is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, VeError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(VeError::file("read", path)(source)),
    };
    let value = serde_json::from_slice(&text).map_err(io::Error::from);
    value.map(Some).map_err(VeError::file("understand", path))
}

/// Writes a JSON file that is complete or not there, also after a power cut.
pub(crate) fn write(path: &Path, value: &impl Serialize) -> Result<(), VeError> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::from);
    write_bytes(path, &text.map_err(VeError::file("write", path))?)
}

/// Writes a file that is complete or not there, also after a power cut.
pub(super) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), VeError> {
    let draft = path.with_extension("new");
    let run = || {
        let mut file = fs::File::create(&draft)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::File::open(parent)?.sync_all()
    };
    run().map_err(VeError::file("write", path))
}
