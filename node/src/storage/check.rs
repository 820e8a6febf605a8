//! What a record may ask for. A record comes from another node: nothing in it is believed.

use ckpt_engine::container::ID_COUNT;
use ckpt_format::{
    container::may_have_device,
    tree::{
        ATTRIBUTE_BYTES_MAX, ATTRIBUTE_COUNT_MAX, Attributes, FILE_DATA_MAX, Node, PATH_LENGTH_MAX,
        Step, Timestamp, travels,
    },
};

use super::error::{TreeError, show};

const NAME_LENGTH_MAX: usize = 255;
const TARGET_LENGTH_MAX: usize = 4095;
const XATTR_VALUE_LENGTH_MAX: usize = 64 << 10;

/// Refuses a step that no source sends.
pub(super) fn check(step: &Step) -> Result<(), TreeError> {
    let mut subject: &[u8] = b"";
    judge(step, &mut subject).map_err(|reason| TreeError::Refused { path: show(subject), reason })
}

fn judge<'a>(step: &'a Step, subject: &mut &'a [u8]) -> Result<(), &'static str> {
    match step {
        Step::Remove { path } | Step::Park { path, .. } | Step::Place { path, .. } => {
            *subject = path;
            named(path)
        }
        Step::Discard { .. } => Ok(()),
        Step::Make { path, node } => {
            *subject = path;
            named(path)?;
            self::node(node)
        }
        Step::Link { existing, path } => {
            *subject = path;
            named(path)?;
            named(existing)
        }
        Step::Resize { path, size } => {
            *subject = path;
            named(path)?;
            end(0, *size)
        }
        Step::Data { path, offset, data } => {
            *subject = path;
            named(path)?;
            if data.len() > FILE_DATA_MAX {
                return Err("too much data");
            }
            end(*offset, data.len() as u64)
        }
        Step::Hole { path, offset, length } => {
            *subject = path;
            named(path)?;
            if *length == 0 {
                return Err("an empty hole");
            }
            end(*offset, *length)
        }
        Step::Describe { path, attributes } => {
            *subject = path;
            if !path.is_empty() {
                named(path)?;
            }
            described(attributes)
        }
    }
}

/// A path of plain names.
fn named(path: &[u8]) -> Result<(), &'static str> {
    if path.len() > PATH_LENGTH_MAX {
        return Err("the path is too long");
    }
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" => return Err("the path has an empty name"),
            b"." | b".." => return Err("the path does not go straight down"),
            name if name.len() > NAME_LENGTH_MAX => return Err("a name is too long"),
            name if name.contains(&0) => return Err("a name has a zero byte"),
            _ => (),
        }
    }
    Ok(())
}

fn end(offset: u64, length: u64) -> Result<(), &'static str> {
    match offset.checked_add(length).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err("the file would be too large"),
    }
}

fn node(node: &Node) -> Result<(), &'static str> {
    match node {
        Node::Symlink { target } if target.is_empty() || target.len() > TARGET_LENGTH_MAX => {
            Err("a link to nowhere, or too far")
        }
        Node::Symlink { target } if target.contains(&0) => Err("a link with a zero byte"),
        Node::Device { block, major, minor } => match !block && may_have_device((*major, *minor)) {
            true => Ok(()),
            false => Err("a device that no VE has"),
        },
        _ => Ok(()),
    }
}

fn described(attributes: &Attributes) -> Result<(), &'static str> {
    let Attributes { mode, uid, gid, accessed, modified, extended } = attributes;
    if *mode > 0o7777 {
        return Err("unknown permission bits");
    }
    if *uid >= ID_COUNT || *gid >= ID_COUNT {
        return Err("an owner outside of the VE");
    }
    let valid = |time: &Timestamp| time.nanoseconds < 1_000_000_000;
    if !valid(accessed) || !valid(modified) {
        return Err("a time that does not exist");
    }
    if extended.len() > ATTRIBUTE_COUNT_MAX {
        return Err("too many attributes");
    }
    let mut bytes = 0;
    for attribute in extended {
        let (name, value) = (&attribute.name, &attribute.value);
        if name.len() > NAME_LENGTH_MAX || name.contains(&0) || !travels(name) {
            return Err("an attribute that does not travel");
        }
        if value.len() > XATTR_VALUE_LENGTH_MAX {
            return Err("too long an attribute");
        }
        bytes += name.len() + value.len();
    }
    if bytes > ATTRIBUTE_BYTES_MAX { Err("too many attributes") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remove(path: &[u8]) -> Step {
        Step::Remove { path: path.to_vec() }
    }

    #[test]
    fn only_paths_straight_down_are_taken() {
        for path in ["a", "a/b", "..a", "a/...", "a b"] {
            assert!(check(&remove(path.as_bytes())).is_ok(), "{path}");
        }
        for path in ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a\0b"] {
            assert!(check(&remove(path.as_bytes())).is_err(), "{path:?}");
        }
        assert!(check(&remove(&[b'a'; 256])).is_err());
        let long = [&b"a/"[..]; PATH_LENGTH_MAX].concat();
        assert!(check(&remove(&long)).is_err());
    }

    #[test]
    fn devices_of_the_host_are_refused() {
        let device = |block, major, minor| Step::Make {
            path: b"x".to_vec(),
            node: Node::Device { block, major, minor },
        };
        assert!(check(&device(false, 1, 3)).is_ok());
        assert!(check(&device(false, 1, 1)).is_err());
        assert!(check(&device(true, 1, 3)).is_err());
        assert!(check(&device(true, 8, 0)).is_err());
    }

    #[test]
    fn sizes_that_no_file_has_are_refused() {
        let path = || b"x".to_vec();
        assert!(check(&Step::Resize { path: path(), size: u64::MAX }).is_err());
        assert!(check(&Step::Hole { path: path(), offset: u64::MAX, length: 2 }).is_err());
        let data = vec![0; FILE_DATA_MAX + 1];
        assert!(check(&Step::Data { path: path(), offset: 0, data: data.into() }).is_err());
    }

    #[test]
    fn owners_and_attributes_of_the_host_are_refused() {
        let describe = |change: fn(&mut Attributes)| {
            let mut attributes = Attributes::default();
            change(&mut attributes);
            check(&Step::Describe { path: Vec::new(), attributes })
        };
        let named = |name: &[u8]| ckpt_format::tree::ExtendedAttribute {
            name: name.to_vec(),
            value: b"y".to_vec(),
        };
        assert!(describe(|_| ()).is_ok());
        assert!(describe(|it| it.uid = 65_536).is_err());
        assert!(describe(|it| it.gid = u32::MAX).is_err());
        assert!(describe(|it| it.mode = 0o10_000).is_err());
        assert!(describe(|it| it.modified.nanoseconds = 1_000_000_000).is_err());
        for name in [&b"trusted.overlay.opaque"[..], b"security.selinux", b"user.a\0b"] {
            let attributes = Attributes { extended: vec![named(name)], ..Attributes::default() };
            assert!(check(&Step::Describe { path: Vec::new(), attributes }).is_err());
        }
    }
}
