//! Gives the skeleton the processes of a layout: births, deaths, sessions and groups.
//!
//! A process is born from its own parent with its own number (clone3(2) `set_tid`) and inherits
//! the session. Where the session is that of a leader who is gone, a temporary leader with the
//! old number makes it and leaves again; where the process was orphaned, it is born from a
//! member of its session through a parent that ends at once.

use std::collections::BTreeMap;

use ckpt_format::process::{Common, Shape};

use super::{Bone, Inconsistency, RebuildError, Skeleton};
use crate::{
    areas::heritage,
    inject::{InjectError, Stopped},
    kin::{self, Kin},
    sys::ptrace::{self, Stop},
};

const CLONE_PARENT: u64 = 0x8000;

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
        for shape in &shapes {
            if !self.processes.contains_key(&shape.pid) {
                self.bear(shape, &mut leaders)?;
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
        for shape in &shapes {
            self.enter_namespaces(shape.pid, shape.namespaces)?;
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
            self.clone_in(&parent.thread, shape.pid, flags(shape.common), shape.exit_signal)?
        } else {
            self.bear_into_session(shape, leaders)?
        };
        let parent = self.bone(shape.parent)?;
        let mut bone = Bone::new(shape.pid, born, Some(parent))?;
        bone.exit_signal = shape.exit_signal;
        if !inherits {
            // Whoever bore it may have been anywhere.
            bone.namespaces = None;
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
    ) -> Result<Stopped, RebuildError> {
        let session = shape.session;
        let flags = flags(shape.common);
        let member = self.processes.values().find(|bone| bone.session == session);
        if let Some(sibling) = self.processes.values().find(|bone| {
            flags == 0
                && bone.session == session
                && bone.parent == shape.parent
                && bone.exit_signal == shape.exit_signal
        }) {
            return self.clone_in(&sibling.thread, shape.pid, CLONE_PARENT, 0);
        }
        match member {
            Some(member) if shape.parent == 1 && flags == 0 => {
                let between = self.clone_in(&member.thread, 0, 0, 0)?;
                let born = self.clone_in(&between, shape.pid, 0, shape.exit_signal)?;
                end(&between)?;
                Ok(born)
            }
            Some(_) => Err(RebuildError::Family { pid: shape.pid }),
            None => {
                let parent = self.bone(shape.parent)?;
                let leader = self.clone_in(&parent.thread, session, flags, shape.exit_signal)?;
                self.call(&leader, shape.pid, "setsid", libc::SYS_setsid, &[])?;
                let born = self.clone_in(&leader, shape.pid, CLONE_PARENT | flags, 0)?;
                leaders.push(leader);
                Ok(born)
            }
        }
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

    fn join_group(
        &mut self,
        shape: &Shape,
        leaders: &mut Vec<Stopped>,
    ) -> Result<(), RebuildError> {
        let bone = self.bone(shape.pid)?;
        if bone.group == shape.group {
            return Ok(());
        }
        let exists = self.processes.values().any(|other| other.group == shape.group);
        if !exists && shape.group != shape.pid {
            let alive = self.processes.contains_key(&shape.group);
            match alive {
                true => self.set_group(shape.group, shape.group)?,
                false => {
                    let leader = self.clone_in(&bone.thread, shape.group, 0, 0)?;
                    self.call(&leader, shape.pid, "setpgid", libc::SYS_setpgid, &[0, 0])?;
                    leaders.push(leader);
                }
            }
        }
        self.set_group(shape.pid, shape.group)
    }

    fn set_group(&mut self, pid: i32, group: i32) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        self.call(&bone.thread, pid, "setpgid", libc::SYS_setpgid, &[0, group as u64])?;
        if let Some(bone) = self.processes.get_mut(&pid) {
            bone.group = group;
        }
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

    /// clone3(2) in a stopped process; the child stops at once. `pid` 0 takes any number.
    pub(super) fn clone_in(
        &self,
        parent: &Stopped,
        pid: i32,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Stopped, RebuildError> {
        const ARGUMENTS: usize = 80;
        let failed = |source| RebuildError::Process { pid, what: "make it", source };
        let mut batch = self.gate.batch();
        let numbers = batch.bytes(&pid.to_le_bytes());
        let mut arguments = [0u8; ARGUMENTS];
        let mut put = |index: usize, value: u64| {
            arguments[index * 8..][..8].copy_from_slice(&value.to_le_bytes());
        };
        put(0, flags);
        put(4, exit_signal as u64);
        if pid != 0 {
            put(8, numbers);
            put(9, 1);
        }
        let arguments = batch.bytes(&arguments);
        let call = batch.call("clone3", libc::SYS_clone3, &[arguments, ARGUMENTS as u64]);
        let done = batch.run(parent).map_err(failed)?;
        done.value(call).map_err(failed)?;
        let born = done.births.first().copied();
        let born = born.ok_or(InjectError::Ended { tid: parent.tid }).map_err(failed)?;
        Stopped::at_birth(born).map_err(failed)
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
