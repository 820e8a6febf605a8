//! Gives the skeleton the processes of a layout: births, deaths, sessions and groups.
//!
//! A process is born from its own parent with its own number (clone3(2) `set_tid`) and inherits
//! the session. Where the session is that of a leader who is gone, a temporary leader with the
//! old number makes it and leaves again; where the process was orphaned, it is born from a
//! member of its session through a parent that ends at once.

use std::collections::{BTreeMap, BTreeSet};

use ckpt_format::process::{Common, Shape};

use super::{
    Bone, Inconsistency, RebuildError, Skeleton,
    birth::{Born, By, Place, seen},
};
use crate::{
    areas::heritage,
    inject::{InjectError, Stopped},
    kin::{self, Kin},
    sys::ptrace::{self, Stop},
};

pub(super) const CLONE_PARENT: u64 = 0x8000;

impl Skeleton {
    pub(super) fn update_tree(&mut self, mut shapes: Vec<Shape>) -> Result<(), RebuildError> {
        if shapes.first().is_none_or(|init| init.pid != 1 || init.zombie.is_some()) {
            return Err(Inconsistency::NoInit.into());
        }
        self.zombies = shapes.extract_if(.., |shape| shape.zombie.is_some()).collect();
        self.end_those_not_in(&shapes)?;
        for shape in shapes.iter().filter(|shape| shape.session == shape.pid) {
            // Before children are born into it.
            if self.processes.get(&shape.pid).is_some_and(|bone| bone.session != shape.pid) {
                self.lead_session(shape.pid)?;
            }
        }
        let mut leaders = Vec::new();
        let all: BTreeSet<i32> = shapes.iter().map(|shape| shape.pid).collect();
        for shape in &shapes {
            if !self.processes.contains_key(&shape.pid) {
                self.bear(shape, &mut leaders)?;
            }
            // Children inherit the group, which those in a pid namespace may have no number for.
            if shape.group == shape.pid || !all.contains(&shape.group) || self.is_group(shape.group)
            {
                self.join_group(shape, &mut leaders)?;
            }
        }
        for shape in &shapes {
            self.join_group(shape, &mut leaders)?;
            let bone = self.bone_mut(shape.pid)?;
            (bone.next_life, bone.common) = (shape.life, shape.common);
        }
        for leader in leaders {
            end(&leader)?;
        }
        // One that is made anew for the children of a process is entered anew by those before it.
        for _ in 0..2 {
            for shape in &shapes {
                self.enter_namespaces(shape.pid, shape.namespaces)?;
            }
        }
        Ok(())
    }

    /// Ends the processes that are gone, and those that would have to change what cannot be
    /// changed: they are born again, with their children.
    fn end_those_not_in(&mut self, shapes: &[Shape]) -> Result<(), RebuildError> {
        let mut kin: BTreeMap<i32, Kin> =
            self.processes.values().map(|bone| (bone.pid, bone.kin())).collect();
        for pid in kin::part(&mut kin, shapes) {
            if let Some(bone) = self.processes.remove(&pid) {
                end(&bone.thread)?;
            }
        }
        for bone in self.processes.values_mut() {
            bone.parent = kin.get(&bone.pid).map_or(bone.parent, |kin| kin.parent);
        }
        Ok(())
    }

    /// Makes a process, and its session where it leads one.
    pub(super) fn bear(
        &mut self,
        shape: &Shape,
        leaders: &mut Vec<Stopped>,
    ) -> Result<(), RebuildError> {
        let parent = self.bone(shape.parent)?;
        let inherits = shape.session == parent.session || shape.session == shape.pid;
        if shape.heir && !inherits {
            return Err(RebuildError::Family { pid: shape.pid });
        }
        let born = if inherits {
            let (place, flags) = (Place::of(shape), flags(shape.common));
            self.bear_by(By::of(parent), place, flags, shape.exit_signal)?
        } else {
            self.bear_into_session(shape, leaders)?
        };
        let parent = self.bone(shape.parent)?;
        let Born { thread, users, namespaces } = born;
        let mut bone = Bone::new(shape.pid, thread, Some(parent))?;
        (bone.users, bone.namespaces) = (users, namespaces);
        bone.exit_signal = shape.exit_signal;
        (bone.space, bone.below) = (shape.namespaces.pid, shape.below.process.clone());
        bone.identity = Kin::of(shape).identity;
        if !inherits {
            bone.session = shape.session;
            bone.group = self.group_of_session(shape.session);
        }
        self.processes.insert(shape.pid, bone);
        if shape.session == shape.pid {
            self.lead_session(shape.pid)?;
        }
        match shape.zombie {
            // It ends at once, and until then needs what its parent has registered there.
            Some(_) => Ok(()),
            // Copied from the parent; the areas of the layout come in `reshape`.
            None if shape.heir => self.inherit(shape),
            None => self.wipe_copied(shape.pid, shape.parent),
        }
    }

    /// Makes a process in a session that is not its parent's.
    fn bear_into_session(
        &self,
        shape: &Shape,
        leaders: &mut Vec<Stopped>,
    ) -> Result<Born, RebuildError> {
        let (flags, place) = (flags(shape.common), Place::of(shape));
        let parent = self.bone(shape.parent)?;
        // Whoever is deeper cannot bear those further out.
        let reaches = |bone: &&Bone| {
            bone.session == shape.session
                && (bone.space == parent.space || bone.below.len() < parent.below.len())
        };
        let mut members = self.processes.values().filter(reaches);
        if let Some(sibling) = members.clone().find(|bone| {
            flags == 0
                && bone.parent == shape.parent
                && bone.exit_signal == shape.exit_signal
                // The kernel lets none that begins a pid namespace have brothers.
                && bone.below.last() != Some(&1)
        }) {
            return self.bear_by(By::of(sibling), place, CLONE_PARENT, 0);
        }
        match members.next() {
            Some(member) if shape.parent == self.reaper_of(parent.space) && flags == 0 => {
                let home = parent.space;
                let any = Place::any(home);
                let between = self.bear_by(By::of(member), any, 0, 0)?;
                let born = self.bear_by(between.by(home), place, 0, shape.exit_signal)?;
                end(&between.thread)?;
                Ok(born)
            }
            Some(_) => Err(RebuildError::Family { pid: shape.pid }),
            None => {
                let leader = self.session_leader(shape, parent)?;
                let by = By::of(parent);
                let (space, signal) = (leader.space, shape.exit_signal);
                let leader = self.bear_by(by, leader, flags, signal)?;
                self.call(&leader.thread, shape.pid, "setsid", libc::SYS_setsid, &[])?;
                let born = self.bear_by(leader.by(space), place, CLONE_PARENT | flags, 0)?;
                leaders.push(leader.thread);
                Ok(born)
            }
        }
    }

    /// Where the leader of a session lived that is gone.
    fn session_leader<'a>(
        &self,
        shape: &'a Shape,
        parent: &Bone,
    ) -> Result<Place<'a>, RebuildError> {
        let below = &shape.below.session;
        let depth = below.iter().take_while(|&&number| number > 0).count();
        let space = match depth {
            depth if depth == parent.below.len() => parent.space,
            depth if depth == shape.below.process.len() => shape.namespaces.pid,
            _ => return Err(RebuildError::Family { pid: shape.pid }),
        };
        Ok(Place { pid: shape.session, space, below: &below[..depth], shape: None })
    }

    fn group_of_session(&self, session: i32) -> i32 {
        self.processes.get(&session).map_or(session, |leader| leader.group)
    }

    fn lead_session(&mut self, pid: i32) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        // Init of a new pid namespace is born into a session that is not its own.
        self.call(&bone.thread, pid, "setsid", libc::SYS_setsid, &[])?;
        if let Some(bone) = self.processes.get_mut(&pid) {
            bone.session = pid;
            bone.group = pid;
        }
        Ok(())
    }

    fn is_group(&self, group: i32) -> bool {
        self.processes.values().any(|other| other.group == group)
    }

    fn join_group(
        &mut self,
        shape: &Shape,
        leaders: &mut Vec<Stopped>,
    ) -> Result<(), RebuildError> {
        let bone = self.bone(shape.pid)?;
        if bone.group == shape.group {
            return Ok(());
        }
        if !self.is_group(shape.group) && shape.group != shape.pid {
            match self.processes.get(&shape.group) {
                Some(leader) => {
                    self.call(&leader.thread, leader.pid, "setpgid", libc::SYS_setpgid, &[0, 0])?;
                    self.bone_mut(shape.group)?.group = shape.group;
                }
                None => {
                    let below = &shape.below.group;
                    if below.contains(&0) {
                        return Err(RebuildError::Family { pid: shape.pid });
                    }
                    let place = Place { pid: shape.group, space: bone.space, below, shape: None };
                    let leader = self.bear_by(By::of(bone), place, 0, 0)?.thread;
                    self.call(&leader, shape.pid, "setpgid", libc::SYS_setpgid, &[0, 0])?;
                    leaders.push(leader);
                }
            }
        }
        self.set_group(shape)
    }

    /// Lets a process join its group, or lets its parent do that where the process itself has no
    /// number for it.
    pub(super) fn set_group(&mut self, shape: &Shape) -> Result<(), RebuildError> {
        let bone = self.bone(shape.pid)?;
        let group = |of: &Bone| seen(shape.group, &shape.below.group, of.below.len());
        let (by, pid, group) = match (group(bone), self.processes.get(&shape.parent)) {
            (0, Some(parent)) => {
                let pid = seen(shape.pid, &bone.below, parent.below.len());
                (parent, pid, group(parent))
            }
            (group, _) => (bone, 0, group),
        };
        if group == 0 {
            return Err(RebuildError::Family { pid: shape.pid });
        }
        let arguments = [pid as u64, group as u64];
        self.call(&by.thread, shape.pid, "setpgid", libc::SYS_setpgid, &arguments)?;
        self.bone_mut(shape.pid)?.group = shape.group;
        Ok(())
    }

    /// What a child has of its parent's areas is the beginning of its own.
    fn inherit(&mut self, shape: &Shape) -> Result<(), RebuildError> {
        let parent = self.bone(shape.parent)?;
        let (areas, late) = (heritage(&parent.areas), parent.late.clone());
        let bone = self.bone_mut(shape.pid)?;
        (bone.areas, bone.late, bone.life) = (areas, late, shape.life);
        Ok(())
    }

    /// A child has a copy of its parent's areas: only the gate may stay.
    fn wipe_copied(&self, pid: i32, parent: i32) -> Result<(), RebuildError> {
        if self.bone(parent)?.areas.is_empty() {
            return Ok(());
        }
        let bone = self.bone(pid)?;
        let mut batch = self.gate.batch();
        let behind = self.gate.base + crate::inject::Gate::SIZE;
        batch.call("munmap", libc::SYS_munmap, &[behind, super::TASK_SIZE - behind]);
        batch.run(&bone.thread)?.all().map_err(bone.failed("empty it"))
    }

    /// One call in a thread of the skeleton.
    pub(super) fn call(
        &self,
        thread: &Stopped,
        pid: i32,
        name: &'static str,
        number: i64,
        arguments: &[u64],
    ) -> Result<u64, RebuildError> {
        let mut batch = self.gate.batch();
        let call = batch.call(name, number, arguments);
        let done = batch.run(thread)?;
        done.value(call).map_err(|source| RebuildError::Process { pid, what: name, source })
    }
}

/// As clone3(2) wants to be told what parent and child have in common.
fn flags(common: Common) -> u64 {
    let descriptors = if common.descriptors { libc::CLONE_FILES } else { 0 };
    let directories = if common.directories { libc::CLONE_FS } else { 0 };
    (descriptors | directories) as u64
}

/// Ends a process of the skeleton; its parent ignores SIGCHLD, so nothing is left of it.
pub(super) fn end(thread: &Stopped) -> Result<(), RebuildError> {
    let tid = thread.tid;
    let control = |source| InjectError::Control { tid, source };
    let pid = nix::unistd::Pid::from_raw(tid);
    match nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
        Err(error) => return Err(control(error.into()).into()),
    }
    while let Stop::Stopped { .. } = ptrace::wait(tid).map_err(control)? {}
    Ok(())
}
