//! The tables of iptables, ip6tables and arptables, as the kernel gives and takes them
//! (`linux/netfilter_ipv4/ip_tables.h` and those beside it).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use super::{tun, users};

/// Which tables, and how their structures differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// `NFPROTO_*`
    pub number: u8,
    /// The file of `/proc/net` with the names of the tables that there are.
    pub names: &'static str,
    /// The socket by which they are asked for.
    pub domain: i32,
    level: i32,
    base: i32,
    /// What is asked whether there is a match; the option behind it, whether there is a target.
    revision: i32,
    /// How many places in the kernel a table can have chains for.
    pub hooks: usize,
    /// Where an entry says how long it is with its matches, and with its target: behind it.
    pub target_at: usize,
    /// Where it has its counters.
    pub counters_at: usize,
    /// Where its matches begin.
    pub matches_at: usize,
}

/// All there are.
pub const FAMILIES: [Family; 3] = [
    Family {
        number: 2,
        names: "ip_tables_names",
        domain: libc::AF_INET,
        level: libc::SOL_IP,
        base: 64,
        revision: 66,
        hooks: 5,
        target_at: 88,
        counters_at: 96,
        matches_at: 112,
    },
    Family {
        number: 10,
        names: "ip6_tables_names",
        domain: libc::AF_INET6,
        level: libc::SOL_IPV6,
        base: 64,
        revision: 68,
        hooks: 5,
        target_at: 140,
        counters_at: 152,
        matches_at: 168,
    },
    Family {
        number: 3,
        names: "arp_tables_names",
        domain: libc::AF_INET,
        level: libc::SOL_IP,
        base: 96,
        // Here there are targets only.
        revision: 98,
        hooks: 3,
        target_at: 164,
        counters_at: 176,
        matches_at: 192,
    },
];

/// How long the name of a table is at most, with its end.
const NAME: usize = 32;
/// Two numbers of 64 bits.
const COUNTER: usize = 16;

/// What a table is like beside its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// The places that it has chains for, as bits.
    pub valid_hooks: u32,
    /// Where the chain of each begins.
    pub hook_entries: Vec<u32>,
    /// Where its policy is.
    pub underflows: Vec<u32>,
    /// How many entries there are.
    pub count: u32,
}

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn name_bytes(name: &str) -> io::Result<[u8; NAME]> {
    let mut bytes = [0; NAME];
    let room = bytes.get_mut(..name.len()).filter(|room| room.len() < NAME);
    room.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name.as_bytes());
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|it| it.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn get(fd: BorrowedFd<'_>, family: Family, name: i32, value: &mut [u8]) -> io::Result<()> {
    let mut size = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let start = value.as_mut_ptr().cast();
    // SAFETY: the kernel reads and writes at most `size` bytes of `value`, which live across the
    // call; these options hold no pointers.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), family.level, name, start, &raw mut size) })
}

fn set(fd: BorrowedFd<'_>, family: Family, name: i32, value: &[u8]) -> io::Result<()> {
    let size = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `size` bytes of `value`. The one option that holds a pointer is
    // given one by [`replace`] alone, to memory that lives across the call.
    check(unsafe {
        libc::setsockopt(fd.as_raw_fd(), family.level, name, value.as_ptr().cast(), size)
    })
}

/// `IPT_SO_GET_INFO`, and how many bytes of entries there are. Asking makes a table that is not
/// there yet.
pub fn info(fd: BorrowedFd<'_>, family: Family, name: &str) -> io::Result<(Info, usize)> {
    let mut value = vec![0; NAME + 4 + 8 * family.hooks + 8];
    value[..NAME].copy_from_slice(&name_bytes(name)?);
    get(fd, family, family.base, &mut value)?;
    let words = |from: usize| (0..family.hooks).map(|it| word(&value, from + 4 * it)).collect();
    let behind = NAME + 4 + 8 * family.hooks;
    let info = Info {
        valid_hooks: word(&value, NAME),
        hook_entries: words(NAME + 4),
        underflows: words(NAME + 4 + 4 * family.hooks),
        count: word(&value, behind),
    };
    Ok((info, word(&value, behind + 4) as usize))
}

/// `IPT_SO_GET_ENTRIES`: `size` bytes of them. Fails with `EAGAIN` if there is another number.
pub fn entries(fd: BorrowedFd<'_>, family: Family, name: &str, size: usize) -> io::Result<Vec<u8>> {
    // What follows is aligned like numbers of 64 bits.
    const HEAD: usize = NAME + 8;
    let mut value = vec![0; HEAD + size];
    value[..NAME].copy_from_slice(&name_bytes(name)?);
    let length = u32::try_from(size).map_err(io::Error::other)?;
    value[NAME..NAME + 4].copy_from_slice(&length.to_ne_bytes());
    get(fd, family, family.base + 1, &mut value)?;
    Ok(value.split_off(HEAD))
}

/// `IPT_SO_SET_REPLACE`: all entries of a table at once.
pub fn replace(
    fd: BorrowedFd<'_>,
    family: Family,
    name: &str,
    info: &Info,
    entries: &[u8],
) -> io::Result<()> {
    if info.hook_entries.len() != family.hooks || info.underflows.len() != family.hooks {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (now, _) = self::info(fd, family, name)?;
    // The kernel wants to tell the counters that there were, one for each entry.
    let mut before = vec![0u8; now.count as usize * COUNTER];
    let size = u32::try_from(entries.len()).map_err(io::Error::other)?;
    let mut value = name_bytes(name)?.to_vec();
    let words = [info.valid_hooks, info.count, size].into_iter();
    let words = words.chain(info.hook_entries.iter().copied());
    let words = words.chain(info.underflows.iter().copied()).chain([now.count]);
    value.extend(words.flat_map(u32::to_ne_bytes));
    // With three hooks and with five the pointer is where it is aligned.
    value.extend((before.as_mut_ptr().expose_provenance() as u64).to_ne_bytes());
    value.extend(entries);
    // `before` has room for as many counters as the value says, and the kernel refuses another
    // number than that of the entries that it replaces.
    match set(fd, family, family.base, &value) {
        // A match of users (`owner`) is taken only from the user namespace of the network.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let users = users::owner(tun::network(fd)?.as_fd())?;
            let again = || set(fd, family, family.base, &value);
            // SAFETY: one system call; it allocates memory for a value of gigabytes alone, which
            // the kernel has refused before.
            unsafe { users::act_in(users.as_fd(), again) }
        }
        done => done,
    }
}

/// `IPT_SO_SET_ADD_COUNTERS`: for each entry, packets and bytes.
pub fn add_counters(
    fd: BorrowedFd<'_>,
    family: Family,
    name: &str,
    counters: &[[u64; 2]],
) -> io::Result<()> {
    let count = u32::try_from(counters.len()).map_err(io::Error::other)?;
    let mut value = name_bytes(name)?.to_vec();
    value.extend(count.to_ne_bytes());
    value.extend([0; 4]);
    value.extend(counters.iter().flatten().flat_map(|number| number.to_ne_bytes()));
    set(fd, family, family.base + 1, &value)
}

/// `IPT_SO_GET_REVISION_MATCH`, or that of a target: whether this kernel has an extension.
pub fn has_extension(
    fd: BorrowedFd<'_>,
    family: Family,
    name: &[u8],
    revision: u8,
    is_target: bool,
) -> bool {
    let option = family.revision + i32::from(is_target);
    let mut value = [0; 30];
    let len = name.len().min(29);
    value[..len].copy_from_slice(&name[..len]);
    value[29] = revision;
    get(fd, family, option, &mut value).is_ok()
}
