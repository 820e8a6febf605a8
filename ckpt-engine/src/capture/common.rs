//! Tables that tasks have in common in ways in which they cannot be made again.

use std::{cmp::Ordering, collections::HashMap};

use crate::{
    procfs::{self, Stat},
    sys::task::{self, Common},
};

/// The processes that cannot be moved for what they have in common with others, and why.
pub(super) fn check(hosts: &[i32]) -> Vec<(i32, &'static str)> {
    let parents: HashMap<i32, (i32, char)> =
        hosts.iter().filter_map(|&host| Some((host, parent(host)?))).collect();
    let alive = |host: &&i32| parents.get(host).is_some_and(|(_, state)| !"ZX".contains(*state));
    let living: Vec<i32> = hosts.iter().filter(alive).copied().collect();
    let mut refused = Vec::new();
    for (what, why) in [
        (Common::Memory, "memory in common with another process (CLONE_VM)"),
        (Common::Descriptors, "a descriptor table in common with a process that is not its parent"),
        (Common::Directories, "directories in common with a process that is not its parent"),
    ] {
        for group in groups(&living, what) {
            let in_group = |host: &i32| group.contains(host);
            let parent = |host: &i32| parents.get(host).map_or(0, |(parent, _)| *parent);
            let waits = |host: &i32| parents.get(host).is_some_and(|(_, state)| *state == 'D');
            let stray = |host: &&i32| match what {
                // Until it executes its program, and its parent waits for that (vfork(2)).
                Common::Memory => {
                    let parent = parent(host);
                    let parent = procfs::stand_in(parent).unwrap_or(parent);
                    in_group(&parent) && !waits(&parent)
                }
                _ => !in_group(&parent(host)),
            };
            // The first of them is the one that others have it from.
            let skipped = usize::from(what != Common::Memory);
            refused.extend(group.iter().filter(stray).skip(skipped).map(|&host| (host, why)));
        }
    }
    refused
}

fn parent(host: i32) -> Option<(i32, char)> {
    let stat = Stat::read(host).ok()?;
    Some((stat.field(4, "ppid").ok()?, stat.state))
}

/// Those that have the same, where there is more than one.
fn groups(hosts: &[i32], what: Common) -> Vec<Vec<i32>> {
    let mut groups: Vec<Vec<i32>> = Vec::new();
    for &host in hosts {
        // One that has ended meanwhile has nothing, and may stand anywhere.
        let order = |group: &Vec<i32>| task::compare(group[0], host, what);
        match groups.binary_search_by(|group| order(group).unwrap_or(Ordering::Less)) {
            Ok(place) => groups[place].push(host),
            Err(place) => groups.insert(place, vec![host]),
        }
    }
    groups.retain(|group| group.len() > 1);
    groups
}

/// Whether a thread of this process has a descriptor table of its own.
pub(super) fn has_table_apart(host: i32) -> bool {
    let apart = |tid| task::share(host, tid, Common::Descriptors).is_ok_and(|same| !same);
    // One that is ending has none.
    let ending = |tid| Stat::read(tid).map_or(true, |stat| "ZX".contains(stat.state));
    procfs::threads(host)
        .is_ok_and(|tids| tids.into_iter().any(|tid| tid != host && apart(tid) && !ending(tid)))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_thread_with_a_table_of_its_own_is_found() {
        let own = std::process::id().cast_signed();
        assert!(!has_table_apart(own));
        let (end, ended) = channel::<()>();
        let (told, parted) = channel();
        let thread = std::thread::spawn(move || {
            told.send(unshare(CloneFlags::CLONE_FILES)).unwrap();
            ended.recv()
        });
        parted.recv().unwrap().unwrap();
        assert!(has_table_apart(own));
        drop(end);
        thread.join().unwrap().unwrap_err();
    }

    #[test]
    fn processes_without_anything_in_common_can_be_moved() {
        let mut sleeper = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let hosts = [std::process::id().cast_signed(), sleeper.id().cast_signed()];
        let refused = check(&hosts);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(refused, []);
    }
}
