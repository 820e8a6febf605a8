//! Mounts: what stands on what, and which of them can be reached by a path.

use serde::{Deserialize, Serialize};

use super::Container;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where in the tree of its namespace.
    pub point: String,
    /// The place, in the same list, of the mount that it stands on. `/` stands on itself.
    #[serde(default)]
    pub parent: u32,
    /// Which of [`Container::filesystems`] it shows.
    pub filesystem: u32,
    /// Which directory or file of it; `/` for all of it.
    pub root: String,
    /// The type of that, as in `st_mode`: files can be mounted, too.
    #[serde(default = "directory")]
    pub file_type: u32,
    /// `MOUNT_ATTR_*` bits.
    pub attributes: u64,
    /// The group of mounts that pass new mounts on to each other. The numbers mean nothing else.
    #[serde(default)]
    pub peers: Option<u32>,
    /// The group whose new mounts it gets, too.
    #[serde(default)]
    pub master: Option<u32>,
    /// Cannot be mounted elsewhere.
    #[serde(default)]
    pub unbindable: bool,
    /// Came with the mount namespace into a user namespace, whose root may not take it away.
    #[serde(default)]
    pub locked: bool,
}

fn directory() -> u32 {
    super::S_IFDIR
}

impl Mount {
    /// True if it shows a directory.
    pub fn is_directory(&self) -> bool {
        self.file_type == super::S_IFDIR
    }
}

/// The mount that something at `point` would stand on, if all of `mounts` can be seen.
pub(super) fn parent(mounts: &[Mount], point: &str) -> u32 {
    let below = mounts.iter().enumerate().filter(|(_, it)| inside(&it.point, point).is_some());
    // The last of those with the longest path lies on top.
    let parent = below.max_by_key(|(_, it)| it.point.len()).map_or(0, |(place, _)| place);
    u32::try_from(parent).unwrap_or(0)
}

/// The path of `point` from `directory`, if it is in it.
pub fn inside<'a>(directory: &str, point: &'a str) -> Option<&'a str> {
    let rest = point.strip_prefix(directory.trim_end_matches('/'))?;
    rest.strip_prefix('/').or(Some(rest).filter(|rest| rest.is_empty()))
}

/// Which mounts of a namespace came with it: the locked ones, and what they stand on.
pub fn locked(mounts: &[Mount]) -> Vec<bool> {
    let mut locked: Vec<bool> = mounts.iter().map(|mount| mount.locked).collect();
    for place in (0..mounts.len()).rev() {
        if let (true, Ok(parent)) = (locked[place], usize::try_from(mounts[place].parent))
            && parent < place
        {
            locked[parent] = true;
        }
    }
    if let Some(root) = locked.first_mut() {
        *root = true;
    }
    locked
}

/// Something that has to be taken away before a path leads to a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover {
    /// Where: what is on top there is in the way.
    pub point: String,
}

/// What hides the mount at `place` of a list: what to unmount, in this order, until its path
/// leads to it. Nothing for a mount that can be seen.
pub fn covers(mounts: &[Mount], place: usize) -> Vec<Cover> {
    let mut own = vec![place];
    while let Some(&last) = own.last()
        && let Ok(parent) = usize::try_from(mounts[last].parent)
        && parent < last
    {
        own.push(parent);
    }
    let mut gone = vec![false; mounts.len()];
    let mut covers = Vec::new();
    // Each turn takes one mount away.
    while let Some(cover) = first_foreign(mounts, &mounts[place].point, &own, &gone) {
        gone[cover.1] = true;
        covers.push(Cover { point: mounts[cover.0].point.clone() });
    }
    covers
}

/// The first mount that a walk along `path` gets into and that is none of `own`; and the one on
/// top of it at the same place, which has to go first.
fn first_foreign(
    mounts: &[Mount],
    path: &str,
    own: &[usize],
    gone: &[bool],
) -> Option<(usize, usize)> {
    let on = |place: usize, point: &str| {
        (0..mounts.len()).find(|&other| {
            other != place
                && !gone[other]
                && usize::try_from(mounts[other].parent) == Ok(place)
                && mounts[other].point == point
        })
    };
    let mut at = 0;
    let parts = path.split('/').filter(|part| !part.is_empty());
    let mut point = String::new();
    let mut steps = vec!["/".to_owned()];
    steps.extend(parts.map(|part| {
        point.push('/');
        point.push_str(part);
        point.clone()
    }));
    for step in steps {
        while let Some(next) = on(at, &step) {
            if !own.contains(&next) {
                let mut top = next;
                while let Some(above) = on(top, &step) {
                    top = above;
                }
                return Some((next, top));
            }
            at = next;
        }
    }
    None
}

/// A part of a file system in memory whose files travel with the VE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Its place in [`Container::filesystems`].
    pub filesystem: usize,
    /// The directory at its top, in that file system.
    pub root: &'a str,
    /// A mount that shows just that: which table of [`Container::mount_tables`], and where in it.
    pub mount: (usize, usize),
}

/// All files in memory that anybody can see: of each file system the largest directories that
/// are mounted somewhere. Where all of it is mounted that is its top.
///
/// # Errors
/// The mount point of a single file whose directory is mounted nowhere.
pub fn parts(container: &Container) -> Result<Vec<Part<'_>>, &str> {
    let mut parts: Vec<Part<'_>> = Vec::new();
    let mut mounts = Vec::new();
    for (table, list) in container.mount_tables().enumerate() {
        mounts.extend(list.iter().enumerate().map(|(place, mount)| (mount, (table, place))));
    }
    // The widest first; of the same ones one that nothing hides.
    let hidden = |(table, place): (usize, usize)| {
        container.mount_tables().nth(table).is_none_or(|list| !covers(list, place).is_empty())
    };
    mounts.sort_by_cached_key(|(mount, at)| (mount.filesystem, mount.root.len(), hidden(*at)));
    for (mount, at) in mounts {
        let Ok(filesystem) = usize::try_from(mount.filesystem) else { continue };
        if !container.filesystems.get(filesystem).is_some_and(super::Filesystem::holds_files) {
            continue;
        }
        let known = |part: &Part<'_>| {
            part.filesystem == filesystem && inside(part.root, &mount.root).is_some()
        };
        if parts.iter().any(known) {
            continue;
        }
        if !mount.is_directory() {
            return Err(&mount.point);
        }
        parts.push(Part { filesystem, root: &mount.root, mount: at });
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(container: &mut Container, point: &str, parent: &str, root: &str) -> usize {
        let mounts = &mut container.mounts;
        let parent = mounts.iter().rposition(|it| it.point == parent).unwrap_or(0);
        let like = mounts.iter().find(|mount| mount.point == "/run").cloned().unwrap();
        mounts.push(Mount {
            point: point.to_owned(),
            parent: u32::try_from(parent).unwrap(),
            root: root.to_owned(),
            ..like
        });
        mounts.len() - 1
    }

    #[test]
    fn what_is_not_hidden_has_no_cover() {
        let fresh = Container::fresh("ve");
        for place in 0..fresh.mounts.len() {
            assert_eq!(covers(&fresh.mounts, place), [], "{}", fresh.mounts[place].point);
        }
    }

    #[test]
    fn covers_are_taken_away_from_above() {
        let mut container = Container::fresh("ve");
        let lower = add(&mut container, "/mnt/a", "/", "/a");
        let deep = add(&mut container, "/mnt/a/b", "/mnt/a", "/b");
        add(&mut container, "/mnt", "/", "/x");
        add(&mut container, "/mnt", "/mnt", "/y");
        let mnt = || Cover { point: "/mnt".to_owned() };
        assert_eq!(covers(&container.mounts, lower), [mnt(), mnt()]);
        assert_eq!(covers(&container.mounts, deep), [mnt(), mnt()]);
        add(&mut container, "/mnt/a", "/mnt/a", "/z");
        let own = Cover { point: "/mnt/a".to_owned() };
        assert_eq!(covers(&container.mounts, lower), [mnt(), mnt(), own]);
    }

    #[test]
    fn of_a_file_system_the_widest_parts_are_taken() {
        let mut container = Container::fresh("ve");
        assert_eq!(parts(&container).unwrap().len(), 4);
        add(&mut container, "/srv", "/", "/below");
        assert_eq!(parts(&container).unwrap().len(), 4);
        let other = container.filesystems.len();
        let run = container.mounts.iter().find(|it| it.point == "/run").unwrap();
        let kind = container.filesystems[run.filesystem as usize].clone();
        container.filesystems.push(kind);
        for (point, root) in [("/a", "/x/a"), ("/b", "/x/b"), ("/c", "/x/b/c")] {
            let place = add(&mut container, point, "/", root);
            container.mounts[place].filesystem = u32::try_from(other).unwrap();
        }
        let found = parts(&container).unwrap();
        let roots: Vec<&str> = found[4..].iter().map(|part| part.root).collect();
        assert_eq!(roots, ["/x/a", "/x/b"]);
    }
}
