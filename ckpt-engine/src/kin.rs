//! Which processes of a skeleton can stay when the tree of the VE changes.
//!
//! Some changes cannot be made to a process from outside: it is ended and born again, and has to
//! be filled again. The source must know of it as well as the target, so both ask here.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ckpt_format::process::{Common, Identity, Shape};

/// What a process has from its birth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kin {
    pub(crate) parent: i32,
    pub(crate) session: i32,
    pub(crate) exit_signal: i32,
    pub(crate) common: Common,
    /// The number of its pid namespace; 0 is the VE's own.
    pub(crate) space: u32,
    /// Its numbers there and in those around it, below the VE's own.
    pub(crate) below: Vec<i32>,
    /// Of one with which a pid namespace begins: who it is. It may have to be that from its birth.
    pub(crate) identity: Option<Identity>,
}

impl Kin {
    pub(crate) fn of(shape: &Shape) -> Self {
        let Shape { parent, session, exit_signal, common, .. } = *shape;
        let (space, below) = (shape.namespaces.pid, shape.below.process.clone());
        let identity = (below.last() == Some(&1)).then(|| shape.below.identity.clone());
        Self { parent, session, exit_signal, common, space, below, identity }
    }

    /// The kernel gives orphans to the first process of the pid namespace that their parent was
    /// in, which is `reaper`, and a process may begin a session. What it had in common with a
    /// parent that has ended it has alone.
    fn can_become(&self, shape: &Shape, reaper: i32) -> bool {
        self.exit_signal == shape.exit_signal
            && (self.parent == shape.parent && self.common == shape.common
                || self.parent != shape.parent && shape.parent == reaper)
            && (self.session == shape.session || shape.session == shape.pid)
            && self.space == shape.namespaces.pid
            && self.below == shape.below.process
            && self.identity.as_ref().is_none_or(|identity| *identity == shape.below.identity)
    }

    /// Whether it is the first process of its pid namespace, and so the one that made it.
    fn is_first(&self) -> bool {
        self.below.last() == Some(&1)
    }
}

/// The processes with which pid namespaces begin and end.
struct Spaces {
    /// By the number of the namespace: its first process, and the namespace around it.
    first: HashMap<u32, (i32, u32)>,
    /// Which one a process is in.
    of: HashMap<i32, u32>,
}

impl Spaces {
    fn new(kin: &BTreeMap<i32, Kin>) -> Self {
        let of: HashMap<i32, u32> = kin.iter().map(|(&pid, has)| (pid, has.space)).collect();
        let around = |has: &Kin| of.get(&has.parent).copied().unwrap_or(0);
        let first = kin.iter().filter(|(_, has)| has.is_first());
        let first = first.map(|(&pid, has)| (has.space, (pid, around(has)))).collect();
        Self { first, of }
    }

    /// Whom the kernel gives the children of a process that has ended.
    fn reaper(&self, ended: i32) -> i32 {
        let space = self.of.get(&ended).copied().unwrap_or(0);
        self.first.get(&space).map_or(1, |(first, _)| *first)
    }

    /// Whether all of a namespace ends with a process.
    fn ends_with(&self, space: u32, first: i32) -> bool {
        let mut at = space;
        // One within another as often as there are any: what is damaged could be a circle.
        for _ in 0..=self.first.len() {
            match self.first.get(&at) {
                Some(&(pid, _)) if pid == first => return true,
                Some(&(_, around)) => at = around,
                None => return false,
            }
        }
        false
    }
}

/// Takes those out of `kin` that are gone or must be born again, and tells which, in an order in
/// which they can be ended: the first process of a pid namespace after all others in it. Parents
/// of those that stay are then as the kernel leaves them.
pub(crate) fn part(kin: &mut BTreeMap<i32, Kin>, shapes: &[Shape]) -> Vec<i32> {
    let wanted: HashMap<i32, &Shape> = shapes.iter().map(|shape| (shape.pid, shape)).collect();
    let spaces = Spaces::new(kin);
    let mut parted = BTreeSet::new();
    let mut order: Vec<(usize, i32)> = Vec::new();
    let mut gone: Vec<i32> = kin
        .iter()
        .filter(|&(pid, has)| {
            let reaper = spaces.reaper(has.parent);
            *pid != 1 && wanted.get(pid).is_none_or(|shape| !has.can_become(shape, reaper))
        })
        .map(|(&pid, _)| pid)
        .collect();
    while !gone.is_empty() {
        for pid in &gone {
            if let Some(has) = kin.remove(pid) {
                let depth = if has.is_first() { has.below.len() } else { usize::MAX };
                order.push((depth, *pid));
            }
        }
        parted.extend(gone.iter().copied());
        for orphan in kin.values_mut().filter(|has| parted.contains(&has.parent)) {
            orphan.parent = spaces.reaper(orphan.parent);
        }
        let ended = std::mem::take(&mut gone);
        // A child whose parent is born again hangs under another one now, where it does not
        // belong.
        gone.extend(kin.iter().filter_map(|(pid, has)| {
            let shape = wanted.get(pid)?;
            let lost = ended.iter().any(|&first| spaces.ends_with(has.space, first));
            (*pid != 1 && (lost || shape.parent != has.parent)).then_some(*pid)
        }));
    }
    order.sort_by_key(|&(depth, _)| std::cmp::Reverse(depth));
    order.into_iter().map(|(_, pid)| pid).collect()
}

#[cfg(test)]
mod tests {
    use ckpt_format::{container::Namespaces, process::Below};

    use super::*;

    fn shape(pid: i32, parent: i32, session: i32) -> Shape {
        Shape { pid, parent, session, exit_signal: libc::SIGCHLD, ..Shape::default() }
    }

    fn check(before: &[Shape], after: &[Shape], expected: &[i32]) {
        let mut kin = before.iter().map(|shape| (shape.pid, Kin::of(shape))).collect();
        let mut parted = part(&mut kin, after);
        parted.sort_unstable();
        assert_eq!(parted, expected);
    }

    #[test]
    fn who_begins_a_session_or_falls_to_init_can_stay() {
        let before = [shape(1, 0, 1), shape(2, 1, 1), shape(3, 2, 1)];
        check(&before, &[shape(1, 0, 1), shape(2, 1, 2), shape(3, 2, 1)], &[]);
        check(&before, &[shape(1, 0, 1), shape(3, 1, 1)], &[2]);
    }

    #[test]
    fn who_falls_to_another_reaper_is_born_again_with_all_below() {
        let before =
            [shape(1, 0, 1), shape(2, 1, 1), shape(3, 1, 1), shape(4, 3, 1), shape(5, 4, 1)];
        let after = [shape(1, 0, 1), shape(2, 1, 1), shape(4, 2, 1), shape(5, 4, 1)];
        check(&before, &after, &[3, 4, 5]);
    }

    fn below(shape: Shape, space: u32, numbers: &[i32]) -> Shape {
        let namespaces = Namespaces { pid: space, ..Namespaces::default() };
        let below = Below { process: numbers.to_vec(), ..Below::default() };
        Shape { namespaces, below, ..shape }
    }

    #[test]
    fn orphans_of_a_pid_namespace_fall_to_its_first_process() {
        let (first, second) = (below(shape(5, 1, 1), 1, &[1]), below(shape(6, 5, 1), 1, &[2]));
        let (third, fallen) = (|parent| below(shape(7, parent, 1), 1, &[3]), [shape(1, 0, 1)]);
        let before = [shape(1, 0, 1), first.clone(), second, third(6)];
        check(&before, &[shape(1, 0, 1), first.clone(), third(5)], &[6]);
        check(&before, &[shape(1, 0, 1), first, third(1)], &[6, 7]);
        check(&before, &fallen, &[5, 6, 7]);
    }

    #[test]
    fn a_pid_namespace_ends_with_its_first_process_which_goes_last() {
        let before = [
            shape(1, 0, 1),
            below(shape(5, 1, 1), 1, &[1]),
            below(shape(6, 5, 1), 2, &[2, 1]),
            below(shape(7, 6, 1), 2, &[3, 2]),
            below(shape(8, 1, 1), 2, &[4, 3]),
        ];
        let mut after = before.clone();
        after[1].exit_signal = libc::SIGUSR1;
        let mut kin = before.iter().map(|shape| (shape.pid, Kin::of(shape))).collect();
        let parted = part(&mut kin, &after);
        assert_eq!(parted, [7, 8, 6, 5]);
    }
}
