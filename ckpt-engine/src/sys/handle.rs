//! File handles: which inode a name means, across renames and told apart from later inodes of
//! the same number.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::descriptor::own;

/// The most bytes in a handle (`MAX_HANDLE_SZ`).
const LENGTH_MAX: usize = 128;
/// Only to tell inodes apart, not to open them (Linux 6.6).
const AT_HANDLE_FID: i32 = 0x200;
/// `OVL_FILEID_V1` and the magic number in it.
const OVERLAY: i32 = 0xf8;
const OVERLAY_MAGIC: u8 = 0xfb;

/// `struct file_handle` with room for the longest one.
#[repr(C)]
struct Buffer {
    length: u32,
    kind: i32,
    bytes: [u8; LENGTH_MAX],
}

/// What a file system calls an inode. Equal handles of one file system are one inode.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    /// The kind of encoding.
    pub kind: i32,
    /// The encoding.
    pub bytes: Vec<u8>,
}

/// name_to_handle_at(2) of a name in a directory; a symbolic link is not followed. The empty
/// name is `directory` itself, which then may be any file. `None` on file systems without
/// handles.
pub fn handle(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Handle>> {
    encode(directory, name, 0)
}

/// A handle only to tell inodes apart, which more file systems have.
pub fn to_tell_apart(file: BorrowedFd<'_>) -> io::Result<Option<Handle>> {
    encode(file, c"", AT_HANDLE_FID)
}

/// The handle of what the top of an overlay is made of: its upper directory, or else its highest
/// lower one. `None` where the kernel does not tell.
pub fn real(top: BorrowedFd<'_>) -> io::Result<Option<Handle>> {
    // `struct ovl_fh`: padding, version, magic, length, flags, the kind of the handle within, the
    // id of its file system, and that handle.
    let told = match encode(top, c"", AT_HANDLE_FID) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
        told => told?,
    };
    let within = told.filter(|told| told.kind == OVERLAY).and_then(|told| {
        let (magic, length) = (*told.bytes.get(4)?, usize::from(*told.bytes.get(5)?));
        let kind = i32::from(*told.bytes.get(7)?);
        let bytes = told.bytes.get(24..length + 3)?.to_vec();
        (magic == OVERLAY_MAGIC).then_some(Handle { kind, bytes })
    });
    Ok(within)
}

fn encode(directory: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<Option<Handle>> {
    let mut buffer = Buffer { length: LENGTH_MAX as u32, kind: 0, bytes: [0; LENGTH_MAX] };
    let mut mount = 0;
    let flags = flags | if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    let into = (&raw mut buffer).cast::<libc::file_handle>();
    // SAFETY: the name is terminated; the buffer begins like `struct file_handle`, has the room
    // that its length tells, and like the mount number lives through the call.
    let result = unsafe {
        let fd = directory.as_raw_fd();
        libc::name_to_handle_at(fd, name.as_ptr(), into, &raw mut mount, flags)
    };
    match result {
        0 => {
            let length = usize::try_from(buffer.length).map_or(LENGTH_MAX, |it| it.min(LENGTH_MAX));
            Ok(Some(Handle { kind: buffer.kind, bytes: buffer.bytes[..length].to_vec() }))
        }
        _ => match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            source => Err(source),
        },
    }
}

/// open_by_handle_at(2): a descriptor that only names the inode. `mount` is any directory of its
/// file system, opened for reading.
pub fn open(mount: BorrowedFd<'_>, handle: &Handle) -> io::Result<OwnedFd> {
    let mut buffer = Buffer { length: 0, kind: handle.kind, bytes: [0; LENGTH_MAX] };
    let room = buffer.bytes.get_mut(..handle.bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(&handle.bytes);
    buffer.length = handle.bytes.len() as u32;
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    let from = (&raw mut buffer).cast::<libc::file_handle>();
    // SAFETY: the buffer begins like `struct file_handle` and has the bytes that its length tells.
    own(unsafe { libc::open_by_handle_at(mount.as_raw_fd(), from, flags) }.into())
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_handle_survives_a_rename_and_not_a_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&a, b"").unwrap();
        let top = File::open(directory.path()).unwrap();
        let before = handle(top.as_fd(), c"a").unwrap();
        assert!(before.is_some());
        std::fs::rename(&a, &b).unwrap();
        assert_eq!(handle(top.as_fd(), c"b").unwrap(), before);
        assert_eq!(handle(File::open(&b).unwrap().as_fd(), c"").unwrap(), before);
        // Most file systems give the next new file the number that has become free.
        std::fs::remove_file(&b).unwrap();
        std::fs::write(&a, b"").unwrap();
        assert_ne!(handle(top.as_fd(), c"a").unwrap(), before);
    }
}
