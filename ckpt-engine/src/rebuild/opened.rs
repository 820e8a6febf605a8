//! The open files of a skeleton, made in the namespaces of the VE.

use std::os::fd::AsFd;

use ckpt_format::files::{File, Files, Kind, RestingConnections};

use super::{Inconsistency, RebuildError, Skeleton};
use crate::{
    files::{self, Rebuilt, Target},
    ipc,
    sys::{descriptor, namespace, task},
};

impl Skeleton {
    /// Makes connections that rest while the VE still runs elsewhere; its networks must be there.
    pub fn make_early(&mut self, told: RestingConnections) -> Result<(), RebuildError> {
        let outside = |source| RebuildError::Outside { pid: 1, what: "find its networks", source };
        let init = task::pidfd_open(self.init()?).map_err(outside)?;
        let networks = self.nested.networks().map_err(outside)?;
        self.early.learn(told, self.id_base, init.as_fd(), &networks);
        Ok(())
    }

    /// Makes the open file descriptions, on a thread that enters the VE's mounts, network,
    /// names and IPC. To be called when all processes exist.
    pub fn open_files(&mut self, captured: &Files) -> Result<Rebuilt, RebuildError> {
        let outside = |what| move |source| RebuildError::Outside { pid: 1, what, source };
        let mut target = Target::new(self.id_base).map_err(outside("prepare its files"))?;
        target.ahead_ns = self.ahead_ns;
        target.early = std::mem::take(&mut self.early).into();
        target.processes = self.hosts().collect();
        let of_thread = |file: &File| matches!(file.kind, Kind::Process { thread: true, .. });
        if captured.files.iter().any(of_thread) {
            target.processes.extend(self.threads()?);
        }
        target.mounts = self.nested.mounts().map_err(outside("find its namespaces"))?;
        target.namespaces = self.nested.all().map_err(outside("find its namespaces"))?;
        target.networks = self.nested.networks().map_err(outside("find its namespaces"))?;
        for (id, file) in self.shared_objects() {
            let copy = file.try_clone().map_err(outside("prepare its shared memory"))?;
            target.shared.insert(id, copy.into());
        }
        let init = task::pidfd_open(self.init()?).map_err(outside("find its namespaces"))?;
        for (number, ipc) in (0..).zip(captured.ipcs()) {
            let nested = self.nested.ipc(number).or((number == 0).then_some(&init));
            let namespace = nested.ok_or(Inconsistency::UnknownNamespace(1))?;
            let mailboxes = ipc::rebuild(namespace, ipc, self.id_base)
                .map_err(outside("make the objects of its IPC namespace"))?;
            target.mailboxes.push(mailboxes);
            self.semaphores.push(ipc.semaphores.clone());
        }
        target.opened = files::open_inside(captured, &init, self).map_err(RebuildError::Files)?;
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                descriptor::unshare_directories().map_err(outside("enter its namespaces"))?;
                let kinds = libc::CLONE_NEWNS
                    | libc::CLONE_NEWNET
                    | libc::CLONE_NEWUTS
                    | libc::CLONE_NEWIPC;
                namespace::join(init.as_fd(), kinds).map_err(outside("enter its namespaces"))?;
                files::rebuild(captured, &target).map_err(RebuildError::Files)
            });
            work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
