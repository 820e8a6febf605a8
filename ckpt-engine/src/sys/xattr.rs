//! Extended attributes of whatever a descriptor refers to; one opened with `O_PATH` will do, so
//! symbolic links and device nodes have theirs read and set without being followed or opened.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

/// The name by which `/proc` knows the descriptor. The kernel follows it to the file itself, and
/// no further when that is a symbolic link.
fn name_of(file: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("digits hold no zero byte")
}

fn length(value: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::last_os_error())
}

/// Asks for the length, then for the bytes; again when they have grown in between.
fn fetch(read: impl Fn(*mut libc::c_char, usize) -> libc::ssize_t) -> io::Result<Vec<u8>> {
    loop {
        let mut bytes = vec![0u8; length(read(ptr::null_mut(), 0))?];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        match length(read(bytes.as_mut_ptr().cast(), bytes.len())) {
            Ok(length) => {
                bytes.truncate(length);
                return Ok(bytes);
            }
            Err(source) if source.raw_os_error() == Some(libc::ERANGE) => (),
            Err(source) => return Err(source),
        }
    }
}

/// The names of all attributes; none on file systems without any.
pub fn list(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let path = name_of(file);
    let names = fetch(|buffer, size| {
        // SAFETY: the path is terminated; the kernel writes at most `size` bytes, which is the
        // length of the buffer, or nothing when it is 0.
        unsafe { libc::listxattr(path.as_ptr(), buffer, size) }
    });
    match names {
        Ok(names) => Ok(names
            .split_inclusive(|&byte| byte == 0)
            .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
            .map(CStr::to_owned)
            .collect()),
        Err(source) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(source) => Err(source),
    }
}

/// The value of an attribute; `None` when the file has no such attribute.
pub fn get(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let path = name_of(file);
    let value = fetch(|buffer, size| {
        // SAFETY: path and name are terminated; the kernel writes at most `size` bytes, which is
        // the length of the buffer, or nothing when it is 0.
        unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.cast(), size) }
    });
    match value {
        Ok(value) => Ok(Some(value)),
        Err(source) => match source.raw_os_error() {
            Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(source),
        },
    }
}

/// Sets an attribute, new or not.
pub fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = name_of(file);
    let (from, size) = (value.as_ptr().cast(), value.len());
    // SAFETY: path and name are terminated; `from` has `size` readable bytes.
    match unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), from, size, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes an attribute.
pub fn remove(file: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let path = name_of(file);
    // SAFETY: path and name are terminated.
    match unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn an_attribute_is_set_read_listed_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::create(directory.path().join("file")).unwrap();
        assert_eq!(get(file.as_fd(), c"user.a").unwrap(), None);
        set(file.as_fd(), c"user.a", b"1").unwrap();
        set(file.as_fd(), c"user.b", b"").unwrap();
        assert_eq!(get(file.as_fd(), c"user.a").unwrap(), Some(b"1".to_vec()));
        assert_eq!(get(file.as_fd(), c"user.b").unwrap(), Some(Vec::new()));
        let mut names = list(file.as_fd()).unwrap();
        names.sort();
        assert_eq!(names, [c"user.a".to_owned(), c"user.b".to_owned()]);
        remove(file.as_fd(), c"user.a").unwrap();
        assert_eq!(list(file.as_fd()).unwrap(), [c"user.b".to_owned()]);
    }

    #[test]
    fn a_symbolic_link_is_asked_itself() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        std::fs::write(&target, b"").unwrap();
        set(File::open(&target).unwrap().as_fd(), c"user.a", b"1").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let link = std::os::unix::fs::OpenOptionsExt::custom_flags(
            std::fs::OpenOptions::new().read(true),
            flags,
        )
        .open(&link)
        .unwrap();
        assert_eq!(list(link.as_fd()).unwrap(), Vec::<CString>::new());
    }
}
