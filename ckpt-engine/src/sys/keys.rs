//! keyctl(2), about keys that are known by their numbers.

use std::io;

use super::check;

const REVOKE: i32 = 3;
const CHANGE_OWNER: i32 = 4;
const SET_PERMISSIONS: i32 = 5;
const SET_TIMEOUT: i32 = 15;

fn keyctl(operation: i32, key: i32, first: u32, second: u32) -> io::Result<()> {
    // SAFETY: these operations take integers and touch no memory of ours.
    check(unsafe { libc::syscall(libc::SYS_keyctl, operation, key, first, second) }).map(drop)
}

/// `KEYCTL_REVOKE`
pub fn revoke(key: i32) -> io::Result<()> {
    keyctl(REVOKE, key, 0, 0)
}

/// `KEYCTL_CHOWN`; `u32::MAX` leaves the user as it is.
pub fn set_owner(key: i32, user: u32, group: u32) -> io::Result<()> {
    keyctl(CHANGE_OWNER, key, user, group)
}

/// `KEYCTL_SETPERM`
pub fn set_permissions(key: i32, permissions: u32) -> io::Result<()> {
    keyctl(SET_PERMISSIONS, key, permissions, 0)
}

/// `KEYCTL_SET_TIMEOUT`
pub fn set_timeout(key: i32, seconds: u32) -> io::Result<()> {
    keyctl(SET_TIMEOUT, key, seconds, 0)
}
