//! Maps of files that an overlay of a program shows and that a layer in the VE's own files holds.
//!
//! The VE's own files are an overlay, too. Of a file in an overlay of an overlay the kernel maps
//! what the lower one has, and tells its path from the top of the layer, as if that were `/`.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use crate::procfs::{self, MapLine};

/// The overlays in a mount namespace.
#[derive(Debug)]
pub(crate) struct View {
    /// The device number of the VE's own files, as maps shows it.
    own: String,
    /// Where they are, and which directories of them are mounted there.
    overlays: Vec<(String, String)>,
}

/// What is known, by the inode of the mount namespace. Of those that have gone nobody tells, and
/// whoever looks at a VE notes its own anew before.
static VIEWS: Mutex<BTreeMap<u64, Arc<View>>> = Mutex::new(BTreeMap::new());
/// The most that is remembered.
const VIEWS_MAX: usize = 10_000;

/// Remembers the overlays of a mount namespace in place of what was known of it before. `own` is
/// the device number of the VE's own files, as mountinfo shows it.
pub(crate) fn remember(namespace: u64, own: &str, overlays: Vec<(String, String)>) {
    let mut views = VIEWS.lock().unwrap_or_else(PoisonError::into_inner);
    if overlays.is_empty() {
        views.remove(&namespace);
        return;
    }
    if views.len() >= VIEWS_MAX {
        views.clear();
    }
    let (major, minor) = own.split_once(':').unwrap_or_default();
    let number = |text: &str| text.parse::<u32>().unwrap_or(u32::MAX);
    let own = format!("{:02x}:{:02x}", number(major), number(minor));
    views.insert(namespace, Arc::new(View { own, overlays }));
}

/// The overlays that a process sees. None for one with a root directory of its own.
pub(crate) fn view_of(pid: i32) -> Option<Arc<View>> {
    if VIEWS.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
        return None;
    }
    let namespace = fs::metadata(procfs::path(pid, "ns/mnt")).ok()?.ino();
    let view = VIEWS.lock().unwrap_or_else(PoisonError::into_inner).get(&namespace).cloned()?;
    let root = fs::read_link(procfs::path(pid, "root")).ok()?;
    (root == Path::new("/")).then_some(view)
}

/// Where the file of a map is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where maps says.
    AsNamed,
    /// In an overlay.
    At(String),
    /// In the layer of an overlay, which does not show it any more.
    Hidden,
}

impl View {
    /// Where the file of a map of a process is.
    pub(crate) fn place(&self, pid: i32, line: &MapLine) -> Place {
        if line.device != self.own || self.shows(pid, &line.name, line.inode) {
            return Place::AsNamed;
        }
        let candidate = |(point, root): &(String, String)| {
            let rest = line.name.strip_prefix(root.trim_end_matches('/'))?;
            let path = format!("{}{rest}", point.trim_end_matches('/'));
            (rest.starts_with('/') && self.shows(pid, &path, line.inode)).then_some(path)
        };
        self.overlays.iter().find_map(candidate).map_or(Place::Hidden, Place::At)
    }

    fn shows(&self, pid: i32, path: &str, inode: u64) -> bool {
        let inside = format!("root/{}", path.trim_start_matches('/'));
        fs::symlink_metadata(procfs::path(pid, &inside)).is_ok_and(|it| it.ino() == inode)
    }
}
