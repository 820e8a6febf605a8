//! Owners, permissions, times and extended attributes: read on the source, set on the target,
//! with ids as the VE sees them in between.
//!
//! Ids are hidden in values, too: the rights of a program (`security.capability`) may name the
//! root that they count for, and access lists (`system.posix_acl_*`) name users and groups.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use ckpt_engine::{container::ID_COUNT, sys::xattr};
use ckpt_format::tree::{Attributes, ExtendedAttribute, Timestamp, travels};
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::{
        stat::{FchmodatFlags, Mode, UtimensatFlags, fchmodat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchownat},
};

use super::{path::proc_name, status::Status};

/// Whoever owns what belongs to nobody inside.
const NOBODY: u32 = 65_534;

/// `VFS_CAP_REVISION_2` and `_3` in the first byte-wise word of `security.capability`.
const CAPABILITY_REVISION_MASK: u32 = 0xff00_0000;
const CAPABILITY_REVISION_2: u32 = 0x0200_0000;
const CAPABILITY_REVISION_3: u32 = 0x0300_0000;
const CAPABILITY_LENGTH_2: usize = 20;
const CAPABILITY_LENGTH_3: usize = 24;

/// Entries of an access list that name a user or a group.
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;
const ACL_HEADER_LENGTH: usize = 4;
const ACL_ENTRY_LENGTH: usize = 8;

/// Between the ids of the VE and those that a mount shows the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    /// What the host sees for root inside; 0 where a layer holds plain ids.
    pub(super) base: u32,
}

impl Ids {
    fn inside(self, id: u32) -> u32 {
        id.checked_sub(self.base).filter(|id| *id < ID_COUNT).unwrap_or(NOBODY)
    }

    fn outside(self, id: u32) -> u32 {
        // Ids were checked when the record came; this only keeps the sum from wrapping.
        self.base.saturating_add(id.min(ID_COUNT - 1))
    }
}

/// Reads the attributes of what is open as a place.
pub(super) fn read(place: BorrowedFd<'_>, status: &Status, ids: Ids) -> io::Result<Attributes> {
    let stamp = &status.stamp;
    let mut extended = Vec::new();
    for name in xattr::list(place)? {
        let bytes = name.as_bytes();
        // Gone in between is as good as never seen.
        if travels(bytes)
            && let Some(value) = xattr::get(place, &name)?
        {
            let value = convert(bytes, value, |id| ids.inside(id), Root::Inside);
            extended.push(ExtendedAttribute { name: bytes.to_vec(), value });
        }
    }
    extended.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(Attributes {
        mode: stamp.mode & 0o7777,
        uid: ids.inside(stamp.uid),
        gid: ids.inside(stamp.gid),
        accessed: status.accessed,
        modified: stamp.modified,
        extended,
    })
}

/// Sets the attributes of what is open as a place. Times come last, and rights after the owner,
/// whose change clears them.
pub(super) fn write(
    place: BorrowedFd<'_>,
    symlink: bool,
    attributes: &Attributes,
    ids: Ids,
) -> io::Result<()> {
    let owner = Some(Uid::from_raw(ids.outside(attributes.uid)));
    let group = Some(Gid::from_raw(ids.outside(attributes.gid)));
    fchownat(place, "", owner, group, AtFlags::AT_EMPTY_PATH)?;
    let name = proc_name(place);
    if !symlink {
        let mode = Mode::from_bits_truncate(attributes.mode);
        fchmodat(AT_FDCWD, name.as_str(), mode, FchmodatFlags::FollowSymlink)?;
    }
    for present in xattr::list(place)? {
        let wanted = attributes.extended.iter().any(|it| it.name == present.as_bytes());
        if travels(present.as_bytes()) && !wanted {
            xattr::remove(place, &present)?;
        }
    }
    for wanted in &attributes.extended {
        let name = CString::new(wanted.name.as_slice()).map_err(io::Error::other)?;
        let value = wanted.value.clone();
        let value = convert(&wanted.name, value, |id| ids.outside(id), Root::Outside(ids));
        if xattr::get(place, &name)?.as_ref() != Some(&value) {
            xattr::set(place, &name, &value)?;
        }
    }
    let time = |time: Timestamp| TimeSpec::new(time.seconds, time.nanoseconds.into());
    let (accessed, modified) = (time(attributes.accessed), time(attributes.modified));
    utimensat(AT_FDCWD, name.as_str(), &accessed, &modified, UtimensatFlags::FollowSymlink)?;
    Ok(())
}

/// How the rights of a program name the root they count for.
#[derive(Clone, Copy)]
enum Root {
    /// Not at all when it is the VE's.
    Inside,
    /// Always.
    Outside(Ids),
}

/// Converts the ids in a value. What is malformed is left alone: the kernel refuses it.
fn convert(name: &[u8], value: Vec<u8>, id: impl Fn(u32) -> u32, root: Root) -> Vec<u8> {
    match name {
        b"security.capability" => capability(value, id, root),
        b"system.posix_acl_access" | b"system.posix_acl_default" => access_list(value, id),
        _ => value,
    }
}

fn capability(mut value: Vec<u8>, id: impl Fn(u32) -> u32, root: Root) -> Vec<u8> {
    let Some(magic) = value.first_chunk().copied().map(u32::from_le_bytes) else { return value };
    let of = match (magic & CAPABILITY_REVISION_MASK, value.len()) {
        (CAPABILITY_REVISION_2, CAPABILITY_LENGTH_2) => None,
        (CAPABILITY_REVISION_3, CAPABILITY_LENGTH_3) => {
            value[CAPABILITY_LENGTH_2..].first_chunk().copied().map(u32::from_le_bytes)
        }
        _ => return value,
    };
    let of = match (of, root) {
        (Some(of), _) => id(of),
        (None, Root::Inside) => 0,
        (None, Root::Outside(ids)) => ids.outside(0),
    };
    value.truncate(CAPABILITY_LENGTH_2);
    let flags = magic & !CAPABILITY_REVISION_MASK;
    let short = matches!(root, Root::Inside) && of == 0;
    let revision = if short { CAPABILITY_REVISION_2 } else { CAPABILITY_REVISION_3 };
    value[..4].copy_from_slice(&(flags | revision).to_le_bytes());
    if !short {
        value.extend_from_slice(&of.to_le_bytes());
    }
    value
}

fn access_list(mut value: Vec<u8>, id: impl Fn(u32) -> u32) -> Vec<u8> {
    let entries = value.get_mut(ACL_HEADER_LENGTH..).unwrap_or_default();
    for entry in entries.chunks_exact_mut(ACL_ENTRY_LENGTH) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if matches!(tag, ACL_USER | ACL_GROUP) {
            let old = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            entry[4..].copy_from_slice(&id(old).to_le_bytes());
        }
    }
    value
}

/// Whether attributes differ in more than when the file was last read.
pub(super) fn differ(left: &Attributes, right: &Attributes) -> bool {
    let Attributes { mode, uid, gid, accessed: _, modified, extended } = left;
    (mode, uid, gid, modified, extended)
        != (&right.mode, &right.uid, &right.gid, &right.modified, &right.extended)
}

/// Whether what is open is a symbolic link, which has no permissions of its own.
pub(super) fn is_symlink(place: BorrowedFd<'_>) -> io::Result<bool> {
    let kind = nix::sys::stat::fstat(place.as_fd())?.st_mode & libc::S_IFMT;
    Ok(kind == libc::S_IFLNK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_of_a_program_name_the_root_outside_and_not_inside() {
        let mut plain = CAPABILITY_REVISION_2.to_le_bytes().to_vec();
        plain.extend_from_slice(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let ids = Ids { base: 100_000 };
        let outside = capability(plain.clone(), |id| ids.outside(id), Root::Outside(ids));
        assert_eq!(outside.len(), CAPABILITY_LENGTH_3);
        assert_eq!(outside[CAPABILITY_LENGTH_2..], 100_000u32.to_le_bytes());
        assert_eq!(capability(outside, |id| ids.inside(id), Root::Inside), plain);
    }

    #[test]
    fn access_lists_name_users_inside() {
        let mut list = vec![2, 0, 0, 0];
        list.extend_from_slice(&[1, 0, 6, 0, 255, 255, 255, 255]);
        list.extend_from_slice(&[2, 0, 6, 0]);
        list.extend_from_slice(&100_033u32.to_le_bytes());
        let ids = Ids { base: 100_000 };
        let inside = access_list(list.clone(), |id| ids.inside(id));
        assert_eq!(inside[8..12], [255; 4]);
        assert_eq!(inside[16..20], 33u32.to_le_bytes());
        assert_eq!(access_list(inside, |id| ids.outside(id)), list);
    }

    #[test]
    fn damaged_values_are_left_alone() {
        for value in [vec![], vec![1], vec![0; 20], vec![0xff; 3], vec![2, 0, 0, 0, 2, 0, 1]] {
            let ids = Ids { base: 5 };
            for name in [&b"security.capability"[..], b"system.posix_acl_access"] {
                assert_eq!(convert(name, value.clone(), |id| ids.inside(id), Root::Inside), value);
            }
        }
    }
}
