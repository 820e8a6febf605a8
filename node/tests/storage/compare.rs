//! What a tree looks like from inside, so that two can be compared exactly.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::Path,
};

use ckpt_engine::sys::xattr;

use crate::pair::{Pair, Side};

/// Everything about one file that a program inside could see.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sight {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    modified: (i64, i64),
    size: u64,
    contents: Option<blake3::Hash>,
    link: Option<Vec<u8>>,
    device: u64,
    /// The first name of the same inode.
    same_as: Option<Vec<u8>>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(crate) type Sights = BTreeMap<Vec<u8>, Sight>;

/// Looks at a tree of one side.
pub(crate) fn look(side: &Side, filesystem: usize) -> Sights {
    let mut sights = Sights::new();
    let mut first_names = HashMap::new();
    let top = side.path(filesystem);
    visit(side.id_base, &top.join("."), b"", &mut first_names, &mut sights);
    sights
}

fn visit(
    base: u32,
    path: &Path,
    name: &[u8],
    first_names: &mut HashMap<u64, Vec<u8>>,
    sights: &mut Sights,
) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    let directory = kind.is_dir();
    let same_as = match first_names.get(&metadata.ino()) {
        Some(first) if !directory => Some(first.clone()),
        _ => {
            first_names.insert(metadata.ino(), name.to_vec());
            None
        }
    };
    let place = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
        .unwrap();
    let mut attributes = Vec::new();
    for attribute in xattr::list(place.as_fd()).unwrap() {
        let value = xattr::get(place.as_fd(), &attribute).unwrap().unwrap();
        attributes.push((attribute.to_bytes().to_vec(), inside(base, attribute.to_bytes(), value)));
    }
    attributes.sort();
    let device = if kind.is_char_device() { metadata.rdev() } else { 0 };
    sights.insert(
        name.to_vec(),
        Sight {
            kind: format!("{kind:?}"),
            mode: metadata.mode(),
            owner: (metadata.uid().wrapping_sub(base), metadata.gid().wrapping_sub(base)),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            size: if directory { 0 } else { metadata.size() },
            contents: kind.is_file().then(|| contents(path)),
            link: kind
                .is_symlink()
                .then(|| fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec()),
            device,
            same_as,
            attributes,
        },
    );
    if directory {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for child in names {
            let full = [name, b"/", child.as_bytes()].concat();
            visit(base, &path.join(&child), &full, first_names, sights);
        }
    }
}

fn contents(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut fs::File::open(path).unwrap(), &mut hasher).unwrap();
    hasher.finalize()
}

/// A value with the ids as seen inside.
fn inside(base: u32, name: &[u8], mut value: Vec<u8>) -> Vec<u8> {
    let mut shift = |at: usize| {
        let id = u32::from_le_bytes(value[at..at + 4].try_into().unwrap());
        value[at..at + 4].copy_from_slice(&id.wrapping_sub(base).to_le_bytes());
    };
    match name {
        b"security.capability" => shift(20),
        b"system.posix_acl_access" | b"system.posix_acl_default" => {
            for entry in (4..value.len()).step_by(8) {
                if value[entry] == 2 || value[entry] == 8 {
                    let id = u32::from_le_bytes(value[entry + 4..entry + 8].try_into().unwrap());
                    value[entry + 4..entry + 8]
                        .copy_from_slice(&id.wrapping_sub(base).to_le_bytes());
                }
            }
        }
        _ => (),
    }
    value
}

/// All trees must look the same on both sides.
pub(crate) fn assert_equal(pair: &Pair, context: &str) {
    for &filesystem in &pair.numbers {
        let (source, target) = (look(&pair.source, filesystem), look(&pair.target, filesystem));
        let mut problems = Vec::new();
        for (name, sight) in &source {
            let shown = name.escape_ascii();
            match target.get(name) {
                None => problems.push(format!("missing: {shown} {sight:?}")),
                Some(other) if other != sight => {
                    problems.push(format!("{shown}:\n  source {sight:?}\n  target {other:?}"));
                }
                Some(_) => (),
            }
        }
        for name in target.keys().filter(|name| !source.contains_key(*name)) {
            problems.push(format!("surplus: {}", name.escape_ascii()));
        }
        problems.truncate(8);
        assert!(problems.is_empty(), "{context}, tree {filesystem}:\n{}", problems.join("\n"));
    }
}
