//! Keys (keyrings(7)).

use std::{
    ffi::{CStr, CString},
    io,
};

use super::super::check;
pub use super::super::keys::{revoke, set_permissions, set_timeout};

/// thread-keyring(7)
pub const OF_THREAD: i32 = -1;
/// process-keyring(7)
pub const OF_PROCESS: i32 = -2;
/// session-keyring(7)
pub const OF_SESSION: i32 = -3;
/// user-keyring(7)
pub const OF_USER: i32 = -4;

const GET_KEYRING: i32 = 0;
const JOIN_SESSION: i32 = 1;
const UPDATE: i32 = 2;
const DESCRIBE: i32 = 6;
const UNLINK: i32 = 9;
const SEARCH: i32 = 10;
const READ: i32 = 11;
const LINK: i32 = 8;
const GET_PERSISTENT: i32 = 22;

/// The number of a key, which a return value is.
fn serial(value: libc::c_long) -> io::Result<i32> {
    check(value).map(|serial| serial as i32)
}

/// add_key(2)
pub fn add(kind: &CStr, description: &CStr, payload: &[u8], keyring: i32) -> io::Result<i32> {
    let bytes = if payload.is_empty() { std::ptr::null() } else { payload.as_ptr() };
    // SAFETY: both texts end with NUL, the kernel reads `payload.len()` bytes at `bytes`, and all
    // live across the call.
    serial(unsafe {
        libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            description.as_ptr(),
            bytes,
            payload.len(),
            keyring,
        )
    })
}

/// `KEYCTL_JOIN_SESSION_KEYRING`; a new one without a name.
pub fn join_session(name: Option<&CStr>) -> io::Result<i32> {
    let name = name.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: the name is NULL or ends with NUL and lives across the call.
    serial(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION, name) })
}

/// `KEYCTL_GET_KEYRING_ID`, which makes it where it is not there.
pub fn keyring(special: i32) -> io::Result<i32> {
    // SAFETY: the call takes integers.
    serial(unsafe { libc::syscall(libc::SYS_keyctl, GET_KEYRING, special, 1) })
}

/// `KEYCTL_GET_PERSISTENT`
pub fn persistent(user: u32, keyring: i32) -> io::Result<i32> {
    // SAFETY: the call takes integers.
    serial(unsafe { libc::syscall(libc::SYS_keyctl, GET_PERSISTENT, user, keyring) })
}

/// `KEYCTL_LINK`
pub fn link(key: i32, keyring: i32) -> io::Result<()> {
    // SAFETY: the call takes integers.
    check(unsafe { libc::syscall(libc::SYS_keyctl, LINK, key, keyring) }).map(drop)
}

/// `KEYCTL_UNLINK`
pub fn unlink(key: i32, keyring: i32) -> io::Result<()> {
    // SAFETY: the call takes integers.
    check(unsafe { libc::syscall(libc::SYS_keyctl, UNLINK, key, keyring) }).map(drop)
}

/// `KEYCTL_UPDATE`
pub fn update(key: i32, payload: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `payload.len()` bytes of `payload`, which lives across the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, UPDATE, key, payload.as_ptr(), payload.len()) })
        .map(drop)
}

/// `KEYCTL_SEARCH`
pub fn search(keyring: i32, kind: &CStr, description: &CStr) -> io::Result<i32> {
    let (kind, description) = (kind.as_ptr(), description.as_ptr());
    // SAFETY: both texts end with NUL and live across the call.
    serial(unsafe { libc::syscall(libc::SYS_keyctl, SEARCH, keyring, kind, description, 0) })
}

/// `KEYCTL_DESCRIBE`: type, user, group, permissions, name.
pub fn describe(key: i32) -> io::Result<String> {
    let bytes = filled(DESCRIBE, key)?;
    let text = CString::from_vec_with_nul(bytes).map_err(io::Error::other)?;
    text.into_string().map_err(io::Error::other)
}

/// `KEYCTL_READ`: the contents of a key, or the numbers of those in a keyring.
pub fn read(key: i32) -> io::Result<Vec<u8>> {
    filled(READ, key)
}

fn filled(operation: i32, key: i32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; 32 << 10];
    let (start, len) = (bytes.as_mut_ptr(), bytes.len());
    // SAFETY: the kernel writes at most `len` bytes at `start`, which are ours.
    let full = check(unsafe { libc::syscall(libc::SYS_keyctl, operation, key, start, len) })?;
    bytes.truncate(usize::try_from(full).unwrap_or(0));
    Ok(bytes)
}
