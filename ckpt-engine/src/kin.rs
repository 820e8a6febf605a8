//! Which processes of a skeleton can stay when the tree of the VE changes.
//!
//! Some changes cannot be made to a process from outside: it is ended and born again, and has to
//! be filled again. The source must know of it as well as the target, so both ask here.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ckpt_format::process::{Common, Shape};

/// What a process has from its birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kin {
    pub(crate) parent: i32,
    pub(crate) session: i32,
    pub(crate) exit_signal: i32,
    pub(crate) common: Common,
}

impl Kin {
    pub(crate) fn of(shape: &Shape) -> Self {
        let Shape { parent, session, exit_signal, common, .. } = *shape;
        Self { parent, session, exit_signal, common }
    }

    /// The kernel gives orphans to init, and a process may begin a session. What it had in common
    /// with a parent that has ended it has alone.
    fn can_become(self, shape: &Shape) -> bool {
        self.exit_signal == shape.exit_signal
            && (self.parent == shape.parent && self.common == shape.common
                || self.parent != shape.parent && shape.parent == 1)
            && (self.session == shape.session || shape.session == shape.pid)
    }
}

/// Takes those out of `kin` that are gone or must be born again, and tells which. Parents of those
/// that stay are then as the kernel leaves them.
pub(crate) fn part(kin: &mut BTreeMap<i32, Kin>, shapes: &[Shape]) -> BTreeSet<i32> {
    let wanted: HashMap<i32, &Shape> = shapes.iter().map(|shape| (shape.pid, shape)).collect();
    let mut parted = BTreeSet::new();
    let mut gone: Vec<i32> = kin
        .iter()
        .filter(|&(pid, has)| {
            *pid != 1 && wanted.get(pid).is_none_or(|shape| !has.can_become(shape))
        })
        .map(|(&pid, _)| pid)
        .collect();
    while !gone.is_empty() {
        for pid in &gone {
            kin.remove(pid);
        }
        parted.extend(gone.drain(..));
        for orphan in kin.values_mut().filter(|has| parted.contains(&has.parent)) {
            orphan.parent = 1;
        }
        // A child whose parent is born again hangs under init now, where it does not belong.
        gone.extend(kin.iter().filter_map(|(pid, has)| {
            let shape = wanted.get(pid)?;
            (*pid != 1 && shape.parent != has.parent).then_some(*pid)
        }));
    }
    parted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(pid: i32, parent: i32, session: i32) -> Shape {
        Shape { pid, parent, session, exit_signal: libc::SIGCHLD, ..Shape::default() }
    }

    fn check(before: &[Shape], after: &[Shape], expected: &[i32]) {
        let mut kin = before.iter().map(|shape| (shape.pid, Kin::of(shape))).collect();
        assert_eq!(part(&mut kin, after).into_iter().collect::<Vec<_>>(), expected);
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
}
