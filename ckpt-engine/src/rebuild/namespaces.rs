//! Puts processes into the namespaces that they are in on the source.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use ckpt_format::{
    container::{Children, Clocks, Namespaces, Waiting},
    process::Process,
};

use super::{
    Bone, CHANNEL, Inconsistency, RebuildError, Skeleton, apart,
    areas::{Message, send_descriptors},
    credentials,
};
use crate::{
    container::{
        Bench, Handles, LateMount, Site, cgroups, clock_offsets, mount_late, offset_lines,
    },
    inject::Stopped,
    sys::namespace::CLONE_NEWTIME,
};

/// The kinds, as `/proc/PID/ns` names them.
const KINDS: [&str; 5] = ["mnt", "uts", "ipc", "net", "time"];

/// Where the clocks are in it.
const TIMES: usize = 4;

/// The namespaces that processes of a VE can be in.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// By kind as in [`KINDS`]: the VE's own first; empty where there is no other.
    kinds: [Vec<OwnedFd>; 5],
    /// The user namespaces of programs.
    users: Vec<OwnedFd>,
    /// The tops of the cgroup namespaces of programs.
    cgroups: Vec<String>,
    /// What is mounted when all pid namespaces and all files are there.
    late: Vec<LateMount>,
    /// What will be seen through these.
    pub(super) waiting: Waiting,
    /// Where overlays are made.
    bench: Option<Bench>,
    /// By number, without the VE's own: what user namespaces are in.
    user_parents: Vec<u32>,
    /// In the same way: the user namespaces that pid namespaces belong to.
    pid_owners: Vec<u32>,
    /// What the clocks of each time namespace are ahead of the host's.
    offsets: Vec<Clocks>,
}

impl Table {
    pub(super) fn new(init: i32, handles: Handles) -> io::Result<Self> {
        let Handles { mounts, names, ipcs, networks, users, cgroups, late, .. } = handles;
        let Handles { user_parents, pid_owners, waiting, bench, .. } = handles;
        let mut kinds = [mounts, names, ipcs, networks, Vec::new()];
        for (kind, name) in kinds.iter_mut().zip(KINDS) {
            if !kind.is_empty() {
                kind.insert(0, File::open(format!("/proc/{init}/ns/{name}"))?.into());
            }
        }
        let offsets = Vec::new();
        Ok(Self { kinds, users, cgroups, late, waiting, bench, user_parents, pid_owners, offsets })
    }

    /// All that programs have made, by kind and number.
    pub(super) fn all(&self) -> io::Result<HashMap<(&'static str, u32), OwnedFd>> {
        let mut all = HashMap::new();
        for (kind, made) in KINDS.iter().zip(&self.kinds).chain([(&"user", &self.users)]) {
            // The VE's own is in front of those of the other kinds.
            let first = u32::from(*kind == "user");
            for (number, namespace) in (first..).zip(made) {
                all.insert((*kind, number), namespace.try_clone()?);
            }
        }
        Ok(all)
    }

    /// The user namespace that a pid namespace belongs to.
    pub(super) fn pid_owner(&self, space: u32) -> u32 {
        at(&self.pid_owners, space).copied().unwrap_or(0)
    }

    /// A user namespace of a program.
    pub(super) fn users_of(&self, number: u32) -> Option<&OwnedFd> {
        at(&self.users, number)
    }

    /// Whether those of a user namespace rule over another one: it is their own, or within.
    pub(super) fn rules(&self, users: u32, over: u32) -> bool {
        let mut at_last = over;
        // Each is in another one; what is damaged could be a circle.
        for _ in 0..=self.user_parents.len() {
            match at(&self.user_parents, at_last) {
                _ if at_last == users => return true,
                Some(&parent) => at_last = parent,
                None => return false,
            }
        }
        false
    }

    /// The mount namespaces, the VE's own first; none if there is no other.
    pub(super) fn mounts(&self) -> io::Result<Vec<OwnedFd>> {
        self.kinds[0].iter().map(OwnedFd::try_clone).collect()
    }

    /// An IPC namespace; `None` as well for the VE's own, if there is no other.
    pub(super) fn ipc(&self, number: u32) -> Option<&OwnedFd> {
        self.kinds[2].get(usize::try_from(number).ok()?)
    }

    /// The network namespaces, in the same way.
    pub(super) fn networks(&self) -> io::Result<Vec<OwnedFd>> {
        self.kinds[3].iter().map(OwnedFd::try_clone).collect()
    }
}

/// What stands for a number in a list that begins with number 1.
fn at<T>(list: &[T], number: u32) -> Option<&T> {
    list.get(usize::try_from(number).ok()?.checked_sub(1)?)
}

fn numbers(namespaces: Namespaces) -> [u32; 5] {
    let Namespaces { mounts, names, ipc, network, time, .. } = namespaces;
    [mounts, names, ipc, network, time]
}

impl Skeleton {
    /// Moves a process from the namespaces that it was born into to those that it is to be in.
    pub(super) fn enter_namespaces(
        &mut self,
        pid: i32,
        wanted: Namespaces,
    ) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        if bone.namespaces == Some(wanted) {
            return Ok(());
        }
        // Whoever joins one takes its children along: what is theirs alone comes afterwards.
        let same = |now: Namespaces| now.time_of_children == wanted.time_of_children;
        let parted = bone.namespaces.is_some_and(|now| now.time != now.time_of_children);
        let now = match bone.namespaces {
            Some(now) if parted && !same(now) => Some(Namespaces { time: u32::MAX, ..now }),
            now => now,
        };
        let founded =
            parted && bone.namespaces.is_some_and(|now| same(now) && now.time == wanted.time);
        self.go_to_namespaces(&bone.thread, pid, now, wanted)?;
        if wanted.time_of_children != wanted.time && !founded {
            self.part_clocks(pid, wanted.time_of_children)?;
        }
        self.bone_mut(pid)?.namespaces = Some(wanted);
        Ok(())
    }

    /// Makes the time namespaces of programs, by pid 1. How far their clocks are ahead of those of
    /// the VE is told.
    pub(super) fn make_clocks(&mut self, ahead: &[Clocks]) -> Result<(), RebuildError> {
        if ahead.is_empty() {
            return Ok(());
        }
        let outside = |source| RebuildError::Outside { pid: 1, what: "make its clocks", source };
        let init = self.init()?;
        let own = clock_offsets(init).map_err(outside)?;
        let home = File::open(format!("/proc/{init}/ns/time")).map_err(outside)?;
        let mut all = vec![home.try_clone().map_err(outside)?.into()];
        for ahead in ahead {
            let offsets = Clocks {
                monotonic_ns: own.monotonic_ns.saturating_add(ahead.monotonic_ns),
                boottime_ns: own.boottime_ns.saturating_add(ahead.boottime_ns),
            };
            all.push(self.new_clocks(1, offsets)?);
            self.nested.offsets.push(offsets);
        }
        self.nested.kinds[TIMES] = all;
        let bone = self.bone(1)?;
        self.pass_descriptor(&bone.thread, 1, &home.into())?;
        let mut batch = self.gate.batch();
        batch.call("setns", libc::SYS_setns, &[0, 0]);
        batch.call("close", libc::SYS_close, &[0]);
        batch.run(&bone.thread)?.all().map_err(bone.failed("return to its clocks"))
    }

    /// Makes a time namespace for the children of a process.
    fn new_clocks(&self, pid: i32, offsets: Clocks) -> Result<OwnedFd, RebuildError> {
        let bone = self.bone(pid)?;
        self.call(&bone.thread, pid, "unshare", libc::SYS_unshare, &[CLONE_NEWTIME as u64])?;
        let outside = |source| RebuildError::Outside { pid, what: "set its clocks", source };
        let host = bone.thread.tid;
        fs::write(format!("/proc/{host}/timens_offsets"), offset_lines(offsets))
            .map_err(outside)?;
        Ok(File::open(format!("/proc/{host}/ns/time_for_children")).map_err(outside)?.into())
    }

    /// A process whose children are born into a time namespace that it is not in itself: only
    /// whoever makes one can be so. What was there in its place is left by all.
    fn part_clocks(&mut self, pid: i32, number: u32) -> Result<(), RebuildError> {
        let unknown = || Inconsistency::UnknownNamespace(pid);
        let offsets = at(&self.nested.offsets, number).copied().ok_or_else(unknown)?;
        let made = self.new_clocks(pid, offsets)?;
        let place = usize::try_from(number).map_err(|_| unknown())?;
        *self.nested.kinds[TIMES].get_mut(place).ok_or_else(unknown)? = made;
        for other in self.processes.values_mut().filter(|other| other.pid != pid) {
            let is_there = |it: Namespaces| it.time == number || it.time_of_children == number;
            if other.namespaces.is_some_and(is_there) {
                other.namespaces = None;
            }
        }
        Ok(())
    }

    /// The same for a thread, which may be in some of them `now`.
    pub(super) fn go_to_namespaces(
        &self,
        thread: &Stopped,
        pid: i32,
        now: Option<Namespaces>,
        wanted: Namespaces,
    ) -> Result<(), RebuildError> {
        let now = now.map(numbers);
        let what = "enter its namespaces";
        for (kind, number) in numbers(wanted).into_iter().enumerate() {
            let known = now.is_some_and(|now| now[kind] == number);
            // Where there is only the VE's own every process is in it.
            if known || (number == 0 && self.nested.kinds[kind].is_empty()) {
                continue;
            }
            let namespace = usize::try_from(number).ok();
            let namespace = namespace.and_then(|number| self.nested.kinds[kind].get(number));
            let namespace = namespace.ok_or(Inconsistency::UnknownNamespace(pid))?;
            self.pass_descriptor(thread, pid, namespace)?;
            let mut batch = self.gate.batch();
            batch.call("setns", libc::SYS_setns, &[0, 0]);
            batch.call("close", libc::SYS_close, &[0]);
            let failed = |source| RebuildError::Process { pid, what, source };
            batch.run(thread)?.all().map_err(failed)?;
        }
        Ok(())
    }

    /// The thread has it as descriptor 0 then, the lowest and free.
    pub(super) fn pass_descriptor(
        &self,
        thread: &Stopped,
        pid: i32,
        descriptor: &OwnedFd,
    ) -> Result<(), RebuildError> {
        let what = "pass a descriptor";
        send_descriptors(&self.channel, &[descriptor.as_raw_fd()])
            .map_err(|source| RebuildError::Outside { pid, what, source })?;
        let mut batch = self.gate.batch();
        let message = Message::add(&mut batch, 1);
        message.receive(&mut batch, CHANNEL);
        let failed = |source| RebuildError::Process { pid, what, source };
        batch.run(thread)?.all().map_err(failed)
    }

    /// Makes the cgroup namespaces of programs, and moves their processes there. To be called
    /// when the cgroups of the VE stand below `top`, empty and without limits.
    ///
    /// The kernel makes one with the cgroup of whoever asks as its top: so the first member of
    /// each goes there for that moment.
    pub fn enter_cgroup_namespaces(&self, top: &Path) -> Result<(), RebuildError> {
        for (number, path) in (1..).zip(&self.nested.cgroups) {
            let inside = |bone: &&Bone| bone.namespaces.is_some_and(|it| it.cgroup == number);
            let mut members = self.processes.values().filter(inside);
            let Some(first) = members.next() else { continue };
            let host = first.thread.tid;
            cgroups::directory(top, path).and_then(|place| cgroups::enter(&place, host))?;
            let unshare = [libc::CLONE_NEWCGROUP as u64];
            self.call(&first.thread, first.pid, "unshare", libc::SYS_unshare, &unshare)?;
            cgroups::enter(top, host)?;
            let what = "open its cgroup namespace";
            let outside = |source| RebuildError::Outside { pid: first.pid, what, source };
            let made = File::open(format!("/proc/{host}/ns/cgroup")).map_err(outside)?.into();
            for bone in members {
                self.pass_descriptor(&bone.thread, bone.pid, &made)?;
                let mut batch = self.gate.batch();
                batch.call("setns", libc::SYS_setns, &[0, libc::CLONE_NEWCGROUP as u64]);
                batch.call("close", libc::SYS_close, &[0]);
                batch.run(&bone.thread)?.all().map_err(bone.failed("enter its namespaces"))?;
            }
        }
        Ok(())
    }

    /// Mounts the `/proc` of each pid namespace below the VE's own, the overlays of programs, and
    /// what stands on those. To be called when all processes and all files are there.
    pub(super) fn mount_late(&mut self) -> Result<(), RebuildError> {
        let late = std::mem::take(&mut self.nested.late);
        if late.is_empty() {
            return Ok(());
        }
        let mut spaces = HashMap::new();
        for space in late.iter().filter_map(LateMount::space) {
            spaces.insert(space, self.pid_space(1, space)?);
        }
        let outside = |what| move |source| RebuildError::Outside { pid: 1, what, source };
        let own = File::open(format!("/proc/{}/ns/mnt", self.init()?));
        let mut tables = vec![own.map_err(outside("find its namespaces"))?.into()];
        let others = self.nested.mounts().map_err(outside("find its namespaces"))?;
        tables.extend(others.into_iter().skip(1));
        let (bench, id_base) = (self.nested.bench.take(), self.id_base);
        mount_late(late, Site { tables: &tables, spaces: &spaces, bench, id_base })
            .map_err(outside("mount its overlays, and the /proc of pid namespaces"))
    }

    /// The next children of a process are born elsewhere than it was. To be called when it has all
    /// its threads and children.
    pub(super) fn part_children(&self, pid: i32) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        match bone.namespaces.unwrap_or_default().children {
            Children::Own => Ok(()),
            Children::Joined(space) => self.join_pids(&bone.thread, pid, space),
            Children::New => {
                let unshare = [libc::CLONE_NEWPID as u64];
                self.call(&bone.thread, pid, "unshare", libc::SYS_unshare, &unshare).map(drop)
            }
        }
    }

    /// The user namespace that a process is to be in, unless that is the VE's own.
    fn users_of(&self, pid: i32) -> Result<Option<&OwnedFd>, RebuildError> {
        let number = self.bone(pid)?.namespaces.unwrap_or_default().user;
        let unknown = || Inconsistency::UnknownNamespace(pid);
        match usize::try_from(number).map_err(|_| unknown())?.checked_sub(1) {
            None => Ok(None),
            Some(place) => Ok(Some(self.nested.users.get(place).ok_or_else(unknown)?)),
        }
    }

    /// Whether a process is to be in a user namespace that is not the VE's own. It enters that
    /// when everything else is done that takes the capabilities of the VE's root.
    pub(super) fn is_user_apart(&self, pid: i32) -> Result<bool, RebuildError> {
        self.users_of(pid).map(|users| users.is_some())
    }

    /// Moves a process into its user namespace. Who it is there is said before, in the VE's own:
    /// so it can be somebody whom the namespace has no number for. One that is in a user namespace
    /// from its birth becomes who it is as far as that has a number.
    pub(super) fn enter_users(&mut self, process: &Process) -> Result<(), RebuildError> {
        let pid = process.pid;
        let bone = self.bone(pid)?;
        let leader = process.threads.first().ok_or(Inconsistency::NoThreads(pid))?;
        let wanted = bone.namespaces.unwrap_or_default().user;
        let Some(users) = self.users_of(pid)? else { return Ok(()) };
        let identity = credentials::identity(&leader.credentials);
        if bone.users != wanted {
            self.pass_descriptor(&bone.thread, pid, users)?;
        }
        let mut batch = self.gate.batch();
        match bone.users {
            0 => credentials::become_user(&mut batch, &identity),
            _ => apart::change_user(&mut batch, bone, &identity, self.id_base)?,
        }
        if bone.users != wanted {
            batch.call("setns", libc::SYS_setns, &[0, libc::CLONE_NEWUSER as u64]);
            batch.call("close", libc::SYS_close, &[0]);
        }
        batch.run(&bone.thread)?.all().map_err(bone.failed("enter its user namespace"))?;
        self.bone_mut(pid)?.users = wanted;
        Ok(())
    }
}
