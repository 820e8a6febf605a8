//! The mount API of file descriptors: fsopen(2), fsmount(2), open_tree(2), move_mount(2),
//! mount_setattr(2).

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use libc::{c_int, c_uint};

const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const FSCONFIG_CMD_RECONFIGURE: c_uint = 7;
const FSPICK_CLOEXEC: c_uint = 1;
const FSPICK_EMPTY_PATH: c_uint = 8;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
const MOVE_MOUNT_SET_GROUP: c_uint = 0x100;

/// `MOUNT_ATTR_*` of mount_setattr(2) that describe one mount.
pub mod attribute {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-id bits do nothing.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes do nothing.
    pub const NODEV: u64 = 0x4;
    /// No program can be run from it.
    pub const NOEXEC: u64 = 0x8;
    /// The bits that hold the choice of access times; 0 there is `relatime`.
    pub const ATIME: u64 = 0x70;
    /// `noatime`.
    pub const NOATIME: u64 = 0x10;
    /// `strictatime`.
    pub const STRICTATIME: u64 = 0x20;
    /// Directories keep no access times.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

fn path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn text(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match c_int::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for the calling wrapper alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A file system being configured.
#[derive(Debug)]
pub struct FilesystemContext(OwnedFd);

impl FilesystemContext {
    /// Starts with a type such as `tmpfs`.
    pub fn open(kind: &str) -> io::Result<Self> {
        Self::open_named(&text(kind)?)
    }

    /// The same, with nothing but a system call.
    pub(super) fn open_named(kind: &CStr) -> io::Result<Self> {
        // SAFETY: the string is terminated and lives through the call.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// Starts with the file system behind a mount, to change options of it.
    pub fn pick(mount: BorrowedFd<'_>) -> io::Result<Self> {
        let fd = mount.as_raw_fd();
        let flags = FSPICK_CLOEXEC | FSPICK_EMPTY_PATH;
        // SAFETY: the string is terminated and lives through the call.
        owned(unsafe { libc::syscall(libc::SYS_fspick, fd, c"".as_ptr(), flags) }).map(Self)
    }

    /// Makes the options set since [`Self::pick`] count.
    pub fn reconfigure(self) -> io::Result<()> {
        self.config(FSCONFIG_CMD_RECONFIGURE, None, std::ptr::null(), 0)
    }

    /// Sets an option; one without a value is a flag.
    pub fn set(&self, key: &str, value: Option<&str>) -> io::Result<()> {
        let key = text(key)?;
        let value = value.map(text).transpose()?;
        let (command, value) = match &value {
            Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
            None => (FSCONFIG_SET_FLAG, std::ptr::null()),
        };
        self.config(command, Some(&key), value, 0)
    }

    /// Sets an option whose value is a path.
    pub fn set_path(&self, key: &str, value: &Path) -> io::Result<()> {
        let (key, value) = (text(key)?, path(value)?);
        self.config(FSCONFIG_SET_STRING, Some(&key), value.as_ptr(), 0)
    }

    /// Makes the superblock and a detached mount of it.
    pub fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, std::ptr::null(), 0)?;
        let fd = self.0.as_raw_fd();
        // SAFETY: the descriptor is open; there are no pointers.
        owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes) })
    }

    fn config(
        &self,
        command: c_uint,
        key: Option<&CStr>,
        value: *const libc::c_char,
        auxiliary: c_int,
    ) -> io::Result<()> {
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let fd = self.0.as_raw_fd();
        // SAFETY: key and value are null or terminated strings that live through the call.
        done(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, auxiliary) })
    }
}

impl From<OwnedFd> for FilesystemContext {
    fn from(context: OwnedFd) -> Self {
        Self(context)
    }
}

impl AsRawFd for FilesystemContext {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Clones the mount under a path into a detached one; sub-mounts stay behind.
pub fn clone_tree(directory: BorrowedFd<'_>, relative: &Path) -> io::Result<OwnedFd> {
    open_tree(directory, relative, libc::OPEN_TREE_CLONE)
}

/// Clones the mount of a directory with all its sub-mounts into a detached tree.
pub fn clone_whole_tree(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let recursive = libc::AT_RECURSIVE.cast_unsigned();
    open_tree(directory, Path::new(""), libc::OPEN_TREE_CLONE | recursive)
}

fn open_tree(directory: BorrowedFd<'_>, relative: &Path, flags: c_uint) -> io::Result<OwnedFd> {
    let name = path(relative)?;
    let flags = flags
        | libc::OPEN_TREE_CLOEXEC
        | (libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW).cast_unsigned();
    let fd = directory.as_raw_fd();
    // SAFETY: the string is terminated and lives through the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, fd, name.as_ptr(), flags) })
}

/// Attaches a detached mount at a path below a directory; an empty one is the directory itself.
pub fn attach(mount: BorrowedFd<'_>, directory: BorrowedFd<'_>, point: &Path) -> io::Result<()> {
    move_mount(mount, directory, &path(point)?, 0)
}

/// Makes a private mount a member of the peer group that another mount of the same file system
/// belongs to, and a slave of whatever that one is a slave of. The new member must show a part
/// of what the other one shows.
pub fn join_group(of: BorrowedFd<'_>, member: BorrowedFd<'_>) -> io::Result<()> {
    move_mount(of, member, c"", MOVE_MOUNT_SET_GROUP)
}

fn move_mount(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    point: &CStr,
    flags: c_uint,
) -> io::Result<()> {
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    let flags = flags | MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both strings are terminated and live through the call.
    done(unsafe {
        libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, point.as_ptr(), flags)
    })
}

/// Sets the attributes of a mount to exactly `attributes` and makes it private.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let all = attribute::RDONLY
        | attribute::NOSUID
        | attribute::NODEV
        | attribute::NOEXEC
        | attribute::ATIME
        | attribute::NODIRATIME
        | attribute::NOSYMFOLLOW;
    change(
        mount,
        0,
        &libc::mount_attr {
            attr_set: attributes,
            attr_clr: all & (attribute::ATIME | !attributes),
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        },
    )
}

/// How a mount and its copies learn of each other's new sub-mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// All learn of all (`MS_SHARED`).
    Shared,
    /// This one learns of those of the group that it was in (`MS_SLAVE`).
    Slave,
    /// There are no copies, and can be none (`MS_UNBINDABLE`).
    Unbindable,
}

/// Changes how a mount and its copies learn of each other's new sub-mounts.
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: Propagation) -> io::Result<()> {
    let propagation = match propagation {
        Propagation::Shared => libc::MS_SHARED,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Unbindable => libc::MS_UNBINDABLE,
    };
    change(mount, 0, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 })
}

/// Makes a detached mount show the ids of its file system as the user namespace maps them.
pub fn set_idmap(mount: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    change(
        mount,
        0,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
        },
    )
}

/// Takes a mount out of the group that it is in.
pub fn set_private(mount: BorrowedFd<'_>) -> io::Result<()> {
    let propagation = libc::MS_PRIVATE;
    change(mount, 0, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 })
}

/// Cuts the whole tree of mounts under a descriptor off from the events of others.
pub fn set_private_recursively(mount: BorrowedFd<'_>) -> io::Result<()> {
    change(
        mount,
        libc::AT_RECURSIVE,
        &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 },
    )
}

fn change(mount: BorrowedFd<'_>, flags: c_int, change: &libc::mount_attr) -> io::Result<()> {
    let flags = flags | libc::AT_EMPTY_PATH;
    let size = size_of::<libc::mount_attr>();
    let fd = mount.as_raw_fd();
    // SAFETY: the structure is initialised, lives through the call and has the size given.
    done(unsafe {
        libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw const *change, size)
    })
}
