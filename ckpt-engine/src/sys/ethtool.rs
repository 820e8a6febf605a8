//! ethtool(8): which features of a link are on.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use super::socket;

const GET_STRINGS: u32 = 0x1b;
const GET_COUNT: u32 = 0x37;
const GET_FEATURES: u32 = 0x3a;
/// `ETH_SS_FEATURES`.
const FEATURES: u32 = 4;
/// `ETH_GSTRING_LEN`.
const NAME: usize = 32;
/// More features than this no kernel has.
const COUNT_MAX: usize = 1024;

/// Sends one request about the link with this name in the network of the calling thread. The
/// kernel writes to `words` what the request says that there is room for.
fn ask(link: &str, words: &mut [u32]) -> io::Result<()> {
    let request = words.first().copied().unwrap_or(0);
    let of = |at: usize| words.get(at).copied().unwrap_or(0) as usize;
    let written = match request {
        GET_COUNT => 16 + 4,
        GET_STRINGS => 12 + of(2).saturating_mul(NAME),
        GET_FEATURES => 8 + of(1).saturating_mul(16),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    if written > size_of_val(words) || link.len() >= libc::IFNAMSIZ || link.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(link.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let ifru_data = words.as_mut_ptr().cast();
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data } };
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let socket = socket::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: `request` is a whole ifreq whose name is NUL-terminated, and whose pointer leads to
    // `words`, which has room for all that the kernel writes for this request, as checked above.
    let result =
        unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCETHTOOL, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The names of the features that are on, as `ethtool -k` shows them.
pub fn features(link: &str) -> io::Result<Vec<String>> {
    let mut count = [GET_COUNT, 0, 1 << FEATURES, 0, 0];
    ask(link, &mut count)?;
    let count = usize::try_from(count[4]).map_err(io::Error::other)?.min(COUNT_MAX);
    let mut names = vec![0; 3 + count * NAME / 4];
    names[..3].copy_from_slice(&[GET_STRINGS, FEATURES, count as u32]);
    ask(link, &mut names)?;
    let blocks = count.div_ceil(32);
    let mut bits = vec![0; 2 + blocks * 4];
    bits[..2].copy_from_slice(&[GET_FEATURES, blocks as u32]);
    ask(link, &mut bits)?;
    let name = |index: usize| {
        let words = &names[3 + index * NAME / 4..][..NAME / 4];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    // Of each block of 32: available, requested, active, never changed.
    let on = |index: &usize| bits[2 + index / 32 * 4 + 2] & 1 << (index % 32) != 0;
    Ok((0..count).filter(on).map(name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_features() {
        assert!(features("lo").unwrap().iter().any(|name| name == "loopback"));
        assert!(features("no such link").is_err());
    }
}
