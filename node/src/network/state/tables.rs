//! The tables of iptables, ip6tables and arptables (`iptables-legacy`), with their counters.
//!
//! What the kernel tells is what it takes: entries name their matches and targets, and what these
//! keep for the kernel alone is left out of what it tells. So no rule is understood here.

use std::{io, os::fd::AsFd};

use ckpt_engine::sys::{
    netns::Netns,
    socket,
    xtables::{self, FAMILIES, Family, Info},
};
use ckpt_format::network::{Network, Table};

use crate::network::{NetworkError, system};

/// How often a table is read again that was changed meanwhile.
const TRIES: u32 = 5;
/// `struct xt_entry_match`, and of a target: length, name and revision; then what it keeps.
const PART: usize = 32;
/// The name in it.
const PART_NAME: std::ops::Range<usize> = 2..31;
/// The same at the end of an error or of a jump: it has no name, or is the end.
const ERROR: &[u8] = b"ERROR";

/// Reads all tables that there are.
pub(super) fn capture(netns: &Netns) -> Result<Vec<Table>, NetworkError> {
    let read = || {
        let mut tables = Vec::new();
        for family in FAMILIES {
            for name in names(family)? {
                tables.push(read(family, name)?);
            }
        }
        Ok(tables)
    };
    let tables: io::Result<_> = netns.run(read).map_err(system("enter a network namespace"))?;
    tables.map_err(system("read the tables of iptables"))
}

/// Of the network of the calling thread.
fn names(family: Family) -> io::Result<Vec<String>> {
    let path = format!("/proc/thread-self/net/{}", family.names);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.split_whitespace().map(str::to_owned).collect()),
        // This kernel has no such tables.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn open(family: Family) -> io::Result<std::os::fd::OwnedFd> {
    socket::socket(family.domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

fn read(family: Family, name: String) -> io::Result<Table> {
    let socket = open(family)?;
    let mut tries = 0;
    loop {
        let (info, size) = xtables::info(socket.as_fd(), family, &name)?;
        let entries = match xtables::entries(socket.as_fd(), family, &name, size) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries < TRIES => {
                tries += 1;
                continue;
            }
            entries => entries?,
        };
        let Info { valid_hooks, hook_entries, underflows, count } = info;
        return Ok(Table {
            family: family.number,
            name,
            valid_hooks,
            hook_entries,
            underflows,
            count,
            entries,
        });
    }
}

/// Makes all tables as captured; those that are there beside them have no rules afterwards.
pub(super) fn rebuild(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    let work = || {
        network.tables.iter().try_for_each(make)?;
        let is_wanted = |family: Family, name: &str| {
            network.tables.iter().any(|it| it.family == family.number && it.name == name)
        };
        without_rules(|family, name| !is_wanted(family, name))
    };
    netns.run(work).map_err(system("enter a network namespace"))?
}

/// Leaves no rules in any table.
pub(super) fn empty(netns: &Netns) -> Result<(), NetworkError> {
    netns.run(|| without_rules(|_, _| true)).map_err(system("enter a network namespace"))?
}

/// Gives these tables what a new one has.
fn without_rules(which: impl Fn(Family, &str) -> bool) -> Result<(), NetworkError> {
    for family in FAMILIES {
        for name in names(family).map_err(system("list the tables of iptables"))? {
            if which(family, &name) {
                let table = read(family, name).map_err(system("read the tables of iptables"))?;
                make(&fresh(family, &table))?;
            }
        }
    }
    Ok(())
}

/// The table without rules, as the kernel makes one: a policy for each hook, and the end.
fn fresh(family: Family, table: &Table) -> Table {
    /// `XT_STANDARD_TARGET` that accepts: a number of its own kind, filled up to eight bytes.
    const ACCEPT: [u8; 8] = [0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    /// `struct xt_error_target`: the name again.
    const END: [u8; 32] = [
        b'E', b'R', b'R', b'O', b'R', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0,
    ];
    let mut entries = Vec::new();
    let mut places = vec![0; family.hooks];
    let mut add = |name: &[u8], data: &[u8]| {
        let at = entries.len();
        entries.resize(at + family.matches_at, 0);
        let len = family.matches_at + PART + data.len();
        for (place, value) in [(family.target_at, family.matches_at), (family.target_at + 2, len)] {
            let value = u16::try_from(value).unwrap_or(0).to_ne_bytes();
            entries[at + place..at + place + 2].copy_from_slice(&value);
        }
        let mut target = [0; PART];
        let size = u16::try_from(PART + data.len()).unwrap_or(0).to_ne_bytes();
        target[..2].copy_from_slice(&size);
        target[PART_NAME.start..PART_NAME.start + name.len()].copy_from_slice(name);
        entries.extend(target);
        entries.extend(data);
        u32::try_from(at).unwrap_or(0)
    };
    for (hook, place) in places.iter_mut().enumerate() {
        if table.valid_hooks >> hook & 1 != 0 {
            *place = add(b"", &ACCEPT);
        }
    }
    add(ERROR, &END);
    Table {
        hook_entries: places.clone(),
        underflows: places,
        count: table.valid_hooks.count_ones() + 1,
        entries,
        ..table.clone()
    }
}

fn make(table: &Table) -> Result<(), NetworkError> {
    let failed = |missing: String, source| NetworkError::Table {
        table: format!("{} of {}", table.name, tool(table.family)),
        missing,
        source,
    };
    let family = FAMILIES.into_iter().find(|family| family.number == table.family);
    let Some(family) = family else {
        return Err(failed(String::new(), io::ErrorKind::Unsupported.into()));
    };
    let work = || -> io::Result<()> {
        let socket = open(family)?;
        let info = Info {
            valid_hooks: table.valid_hooks,
            hook_entries: table.hook_entries.clone(),
            underflows: table.underflows.clone(),
            count: table.count,
        };
        xtables::replace(socket.as_fd(), family, &table.name, &info, &table.entries)?;
        let counters: Vec<_> =
            entries(family, &table.entries).map(|it| counters(family, it)).collect();
        xtables::add_counters(socket.as_fd(), family, &table.name, &counters)
    };
    work().map_err(|source| failed(missing(family, table), source))
}

fn tool(family: u8) -> &'static str {
    match family {
        2 => "iptables",
        10 => "ip6tables",
        _ => "arptables",
    }
}

/// The first match or target that this kernel does not have, for people.
fn missing(family: Family, table: &Table) -> String {
    let Ok(socket) = open(family) else { return String::new() };
    let lacks = |&(name, revision, is_target): &(&[u8], u8, bool)| {
        !xtables::has_extension(socket.as_fd(), family, name, revision, is_target)
    };
    let all = entries(family, &table.entries).flat_map(|entry| parts(family, entry));
    all.filter(|(name, ..)| !name.is_empty() && *name != ERROR).find(lacks).map_or_else(
        String::new,
        |(name, revision, is_target)| {
            let kind = if is_target { "target" } else { "match" };
            format!(", whose {kind} {} {revision} is not there", String::from_utf8_lossy(name))
        },
    )
}

/// The entries of a table, one by one, as far as they are whole.
fn entries(family: Family, all: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = all;
    std::iter::from_fn(move || {
        let len = usize::from(half(rest, family.target_at + 2)?);
        if len < family.matches_at {
            return None;
        }
        let (entry, behind) = rest.split_at_checked(len)?;
        rest = behind;
        Some(entry)
    })
}

/// Name, revision and kind of each match of an entry, and of its target.
fn parts(family: Family, entry: &[u8]) -> impl Iterator<Item = (&[u8], u8, bool)> {
    let target_at = half(entry, family.target_at).map_or(0, usize::from);
    let mut at = family.matches_at;
    std::iter::from_fn(move || {
        let part = entry.get(at..)?;
        let len = usize::from(half(part, 0)?);
        let name = part.get(PART_NAME)?.split(|byte| *byte == 0).next()?;
        let found = (name, *part.get(PART_NAME.end)?, at == target_at);
        at = if len < PART { entry.len() } else { at + len };
        Some(found)
    })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Packets and bytes.
fn counters(family: Family, entry: &[u8]) -> [u64; 2] {
    [0, 8].map(|at| {
        let bytes = entry.get(family.counters_at + at..).and_then(|it| it.first_chunk());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of a new network, as the kernel makes it.
    fn table(netns: &Netns, family: Family, name: &str) -> Table {
        netns.run(|| read(family, name.to_owned())).unwrap().unwrap()
    }

    #[test]
    fn a_table_without_rules_is_one_that_the_kernel_makes() {
        let netns = Netns::create().unwrap();
        for (family, name) in FAMILIES.into_iter().zip(["nat", "mangle", "filter"]) {
            let made = table(&netns, family, name);
            let ours = fresh(family, &made);
            netns.run(|| make(&ours)).unwrap().unwrap();
            assert_eq!(table(&netns, family, name), made, "{name} of {}", tool(family.number));
        }
    }

    #[test]
    fn tables_come_back_with_their_counters() {
        let (source, target) = (Netns::create().unwrap(), Netns::create().unwrap());
        for (family, counter) in FAMILIES.into_iter().zip(10..) {
            table(&source, family, "filter");
            let add = || {
                let socket = open(family)?;
                let counters = [[counter, 1000], [2, 3], [4, 5], [0, 0]];
                xtables::add_counters(socket.as_fd(), family, "filter", &counters)
            };
            source.run(add).unwrap().unwrap();
        }
        let tables = capture(&source).unwrap();
        assert_eq!(tables.len(), 3);
        let first = |table: &Table| counters(FAMILIES[0], &table.entries);
        assert_eq!(first(&tables[0]), [10, 1000]);
        // What was there before has no rules afterwards.
        table(&target, FAMILIES[0], "raw");
        rebuild(&target, &Network { tables: tables.clone(), ..Network::default() }).unwrap();
        let found = capture(&target).unwrap();
        let found: Vec<_> = found.into_iter().filter(|table| table.name == "filter").collect();
        assert_eq!(found, tables);
    }

    #[test]
    fn what_a_kernel_does_not_have_is_named() {
        let netns = Netns::create().unwrap();
        let [v4, ..] = FAMILIES;
        let mut unknown = table(&netns, v4, "filter");
        unknown.entries[v4.matches_at + PART_NAME.start..][..6].copy_from_slice(b"NOSUCH");
        let error = netns.run(|| make(&unknown)).unwrap().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("filter of iptables, whose target NOSUCH 0 is not there"), "{text}");
        let unknown = Table { name: "nothing".to_owned(), ..unknown };
        netns.run(|| make(&unknown)).unwrap().unwrap_err();
    }
}
