//! Puts processes into the namespaces that they are in on the source.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use ckpt_format::container::Namespaces;

use super::{
    CHANNEL, Inconsistency, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
};
use crate::container::Handles;

/// The kinds, as `/proc/PID/ns` names them.
const KINDS: [&str; 4] = ["mnt", "uts", "ipc", "net"];

/// The namespaces that processes of a VE can be in.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// By kind as in [`KINDS`]: the VE's own first; empty where there is no other.
    kinds: [Vec<OwnedFd>; 4],
}

impl Table {
    pub(super) fn new(init: i32, handles: Handles) -> io::Result<Self> {
        let Handles { mounts, names, ipcs, networks } = handles;
        let mut kinds = [mounts, names, ipcs, networks];
        for (kind, name) in kinds.iter_mut().zip(KINDS) {
            if !kind.is_empty() {
                kind.insert(0, File::open(format!("/proc/{init}/ns/{name}"))?.into());
            }
        }
        Ok(Self { kinds })
    }

    /// The mount namespaces, the VE's own first; none if there is no other.
    pub(super) fn mounts(&self) -> io::Result<Vec<OwnedFd>> {
        self.kinds[0].iter().map(OwnedFd::try_clone).collect()
    }

    /// The network namespaces, in the same way.
    pub(super) fn networks(&self) -> io::Result<Vec<OwnedFd>> {
        self.kinds[3].iter().map(OwnedFd::try_clone).collect()
    }
}

fn numbers(namespaces: Namespaces) -> [u32; 4] {
    let Namespaces { mounts, names, ipc, network, cgroup: _ } = namespaces;
    [mounts, names, ipc, network]
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
        let now = bone.namespaces.map(numbers);
        for (kind, number) in numbers(wanted).into_iter().enumerate() {
            let known = now.is_some_and(|now| now[kind] == number);
            // Where there is only the VE's own every process is in it.
            if known || (number == 0 && self.nested.kinds[kind].is_empty()) {
                continue;
            }
            let namespace = usize::try_from(number).ok();
            let namespace = namespace.and_then(|number| self.nested.kinds[kind].get(number));
            let namespace = namespace.ok_or(Inconsistency::UnknownNamespace(pid))?;
            send_descriptors(&self.channel, &[namespace.as_raw_fd()]).map_err(|source| {
                RebuildError::Outside { pid, what: "pass a namespace", source }
            })?;
            // Received as descriptor 0, the lowest and free.
            let mut batch = self.gate.batch();
            let message = Message::add(&mut batch, 1);
            message.receive(&mut batch, CHANNEL);
            batch.call("setns", libc::SYS_setns, &[0, 0]);
            batch.call("close", libc::SYS_close, &[0]);
            batch.run(&bone.thread)?.all().map_err(bone.failed("enter its namespaces"))?;
        }
        if let Some(bone) = self.processes.get_mut(&pid) {
            bone.namespaces = Some(wanted);
        }
        Ok(())
    }
}
