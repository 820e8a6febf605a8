//! Why an operation on a VE failed, and how the vz programs say so.

use std::{io, net::IpAddr, path::PathBuf};

use ckpt_engine::container::ContainerError;
use ckpt_format::network::Mac;

use super::{RegistryError, VeId};
use crate::{
    api::{Failure, chain},
    cgroup::CgroupError,
    network::NetworkError,
    template::TemplateError,
};

/// Why an operation on a VE failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what the messages say")]
pub enum VeError {
    /// No VE of that number or name.
    #[error("Container {ve} does not exist")]
    Unknown { ve: String },
    /// There is a VE of that number already.
    #[error("Container {id} already exists")]
    Exists { id: VeId },
    /// Another operation is under way.
    #[error("Container {id} is locked: {operation} is under way")]
    Locked { id: VeId, operation: &'static str },
    /// A part of its memory is on another node.
    #[error(
        "Container {id} is busy: {mebibytes} MiB of its memory are still to come from the node that \
         it was moved from"
    )]
    Incomplete { id: VeId, mebibytes: u64 },
    /// It runs.
    #[error("Container {id} is already running")]
    Running { id: VeId },
    /// It does not run.
    #[error("Container {id} is not running")]
    NotRunning { id: VeId },
    /// Its state lies in a checkpoint.
    #[error("Container {id} is suspended")]
    Suspended { id: VeId },
    /// It must not be started.
    #[error("Container {id} is disabled")]
    Disabled { id: VeId },
    /// A value of an option cannot be used.
    #[error("bad value for {option}: {value}")]
    BadValue { option: &'static str, value: String },
    /// A text is no address.
    #[error("bad IP address: {value}")]
    BadAddress { value: String },
    /// An address belongs to another VE.
    #[error("the IP address {address} is already in use by container {by}")]
    AddressInUse { address: IpAddr, by: VeId },
    /// A host on the LAN, which is no VE of the cluster, has an address.
    #[error("the IP address {address} is already in use by the host with the MAC address {owner}")]
    AddressOnNetwork { address: IpAddr, owner: Mac },
    /// A name belongs to another VE.
    #[error("the name {name} is already used by container {by}")]
    NameInUse { name: String, by: VeId },
    /// Nothing says what to make the VE from.
    #[error("no OS template given")]
    NoTemplate,
    /// The template cannot be used.
    #[error("cannot use the OS template")]
    Template(#[from] TemplateError),
    /// The container cannot be made or entered.
    #[error("cannot set the container up")]
    Container(#[from] ContainerError),
    /// Its limits cannot be set.
    #[error("cannot set the limits")]
    Cgroup(#[from] CgroupError),
    /// Its network cannot be set up.
    #[error("cannot set the network up")]
    Network(#[from] NetworkError),
    /// The cluster refuses.
    #[error("the cluster refuses")]
    Registry(#[from] RegistryError),
    /// A file of the VE cannot be used.
    #[error("cannot {act} {path}")]
    File { act: &'static str, path: PathBuf, source: io::Error },
    /// It did not stop.
    #[error("Container {id} did not stop")]
    NotStopped { id: VeId },
    /// It ended before its boot was complete.
    #[error("Container {id} ended during its start")]
    EndedEarly { id: VeId },
    /// The boot did not complete.
    #[error("Container {id} has not finished its start after {waited_s} s")]
    NotReady { id: VeId, waited_s: u64 },
    /// A task of the daemon failed.
    #[error("the daemon failed")]
    Task(#[from] tokio::task::JoinError),
}

impl VeError {
    /// For `map_err`: what was to be done to which file.
    pub(crate) fn file(
        act: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { act, path, source }
    }

    /// The stable code, and the exit status that OpenVZ's users know.
    fn code(&self) -> (&'static str, i32) {
        match self {
            Self::Unknown { .. } => ("ve-unknown", 14),
            Self::Exists { .. } => ("ve-exists", 44),
            Self::Locked { .. } => ("ve-locked", 9),
            Self::Incomplete { .. } => ("ve-incomplete", 9),
            Self::Running { .. } => ("ve-running", 32),
            Self::NotRunning { .. } => ("ve-not-running", 31),
            Self::Suspended { .. } => ("ve-suspended", 31),
            Self::Disabled { .. } => ("ve-disabled", 105),
            Self::BadValue { option: "--hostname", .. } => ("bad-hostname", 70),
            Self::BadValue { option: "--name", .. } => ("bad-name", 131),
            Self::BadValue { .. } => ("bad-value", 21),
            Self::BadAddress { .. } => ("bad-address", 71),
            Self::AddressInUse { .. }
            | Self::AddressOnNetwork { .. }
            | Self::Registry(RegistryError::AddressTaken { .. }) => ("address-in-use", 78),
            Self::NameInUse { .. } | Self::Registry(RegistryError::NameTaken { .. }) => {
                ("name-in-use", 131)
            }
            Self::NoTemplate => ("no-template", 29),
            Self::Template(TemplateError::Unknown { .. }) => ("template-unknown", 91),
            Self::Template(_) => ("template-failed", 47),
            Self::Container(_) => ("container-failed", 7),
            Self::Cgroup(_) => ("limits-failed", 1),
            Self::Network(_) => ("network-failed", 34),
            Self::Registry(RegistryError::IdTaken { .. }) => ("ve-exists", 44),
            Self::Registry(RegistryError::NotOwner { .. }) => ("ve-elsewhere", 14),
            Self::Registry(RegistryError::Unavailable(_)) => ("cluster-unavailable", 3),
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ("no-space", 46)
            }
            Self::File { .. } | Self::Task(_) => ("system", 3),
            Self::NotStopped { .. } => ("ve-not-stopped", 33),
            Self::EndedEarly { .. } | Self::NotReady { .. } => ("ve-wait-failed", 133),
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Unknown { .. } => "vzlist -a shows all containers",
            Self::Locked { .. } => "try again when it has ended",
            Self::Incomplete { .. } => {
                "try again when all of it has come; vzlist shows how much is left"
            }
            Self::NotRunning { .. } => "start it with vzctl start",
            Self::Suspended { .. } => {
                "vzctl resume lets it go on; vzctl stop --fast throws its memory away"
            }
            Self::Disabled { .. } => "vzctl set --disabled no, or vzctl start --force",
            Self::AddressOnNetwork { .. } => "choose another address, or free it on that host",
            Self::NoTemplate => "give one with --ostemplate; vzpkg list shows them",
            Self::Template(TemplateError::Unknown { .. }) => "vzpkg list shows the OS templates",
            Self::Template(TemplateError::Program { .. }) => {
                "install it (on Debian: apt-get install mmdebstrap)"
            }
            Self::NotStopped { .. } => "vzctl stop --fast kills it",
            _ => return None,
        })
    }
}

impl From<VeError> for Failure {
    fn from(problem: VeError) -> Self {
        let (code, exit) = problem.code();
        let hint = problem.hint().map(str::to_owned);
        Self { code: code.to_owned(), exit, message: chain(&problem), hint }
    }
}
