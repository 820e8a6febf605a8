//! Where the things of a testbed are and what they are called.

use std::{
    fmt,
    fs::File,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use ckpt_engine::sys::netns::Netns;
use nix::fcntl::{Flock, FlockArg};

use super::{TestbedError, state::State, system};

/// One host on the LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// A node of the cluster, counted from 1.
    Node(u8),
    /// A host that is no node.
    Client,
}

impl Host {
    /// Its address on the LAN.
    pub fn address(&self) -> Ipv4Addr {
        match self {
            Self::Node(number) => Ipv4Addr::new(10, 77, 255, *number),
            Self::Client => Ipv4Addr::new(10, 77, 255, 250),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(number) => f.pad(&format!("node{number}")),
            Self::Client => f.pad("client"),
        }
    }
}

/// The length of the LAN's prefix.
pub(super) const LAN_PREFIX: u8 = 16;

/// Names and places, all made from the testbed's name.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    base: PathBuf,
    name: String,
}

impl Layout {
    pub(super) fn new(base: &Path, name: &str) -> Result<Self, TestbedError> {
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !plain || !(1..=12).contains(&name.len()) {
            return Err(TestbedError::BadName { name: name.into() });
        }
        let base = std::path::absolute(base).map_err(system("find", base))?;
        Ok(Self { base, name: name.into() })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    /// The directory of the testbed.
    pub(super) fn directory(&self) -> PathBuf {
        self.base.join(&self.name)
    }

    /// The vz programs, for the PATH of commands.
    pub(super) fn programs(&self) -> PathBuf {
        self.directory().join("bin")
    }

    pub(super) fn node(&self, node: &Host) -> PathBuf {
        self.directory().join(node.to_string())
    }

    pub(super) fn configuration(&self, node: &Host) -> PathBuf {
        self.node(node).join("vzd.toml")
    }

    /// What the node's daemon keeps.
    pub(super) fn state(&self, node: &Host) -> PathBuf {
        self.node(node).join("state")
    }

    pub(super) fn log(&self, node: &Host) -> PathBuf {
        self.node(node).join("vzd.log")
    }

    pub(super) fn run_directory(&self, node: &Host) -> PathBuf {
        self.node(node).join("run")
    }

    pub(super) fn socket(&self, node: &Host) -> PathBuf {
        self.run_directory(node).join("vzd.sock")
    }

    /// Where the daemon says that it is ready.
    pub(super) fn ready_socket(&self, node: &Host) -> PathBuf {
        self.node(node).join("ready.sock")
    }

    /// The cgroup that holds all of the testbed's, below each hierarchy.
    pub(super) fn cgroup(&self) -> String {
        format!("ferry-testbed-{}", self.name)
    }

    /// The directory of named network namespaces, where `ip netns` looks as well.
    pub(super) fn netns_directory() -> &'static Path {
        Path::new("/run/netns")
    }

    /// What the names of the testbed's namespaces start with. No name of a testbed has a dash,
    /// so none is the start of another's.
    pub(super) fn netns_prefix(&self) -> String {
        format!("ferry-{}-", self.name)
    }

    pub(super) fn netns_path(&self, name: &str) -> PathBuf {
        Self::netns_directory().join(self.netns_prefix() + name)
    }

    pub(super) fn open_netns(&self, host: &Host) -> Result<Netns, TestbedError> {
        self.open_named_netns(&host.to_string())
    }

    pub(super) fn open_named_netns(&self, name: &str) -> Result<Netns, TestbedError> {
        let path = self.netns_path(name);
        Netns::open(&path).map_err(system("open the namespace", path))
    }

    /// Keeps other commands from changing the testbed meanwhile.
    pub(super) fn lock(&self) -> Result<Flock<File>, TestbedError> {
        std::fs::create_dir_all(&self.base).map_err(system("make", &self.base))?;
        let path = self.lock_file();
        loop {
            let file = File::create(&path).map_err(system("make", &path))?;
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
                .map_err(|_| TestbedError::Busy { name: self.name.clone() })?;
            // The file may have been removed with its testbed between the two calls.
            if same_file(&lock, &path) {
                return Ok(lock);
            }
        }
    }

    pub(super) fn lock_file(&self) -> PathBuf {
        self.base.join(format!(".{}.lock", self.name))
    }

    pub(super) fn make_directories(&self, state: &State) -> Result<(), TestbedError> {
        let programs = self.programs();
        std::fs::create_dir_all(&programs).map_err(system("make", &programs))?;
        for node in state.nodes() {
            let directory = self.node(&node);
            std::fs::create_dir_all(&directory).map_err(system("make", &directory))?;
        }
        let link = |name: &str, target: &str| {
            let target = state.programs.join(target);
            if !target.exists() {
                return Err(TestbedError::NoProgram { path: target });
            }
            let place = programs.join(name);
            std::os::unix::fs::symlink(target, &place).map_err(system("make the link", &place))
        };
        link("vzd", "vzd")?;
        for name in ["vzctl", "vzlist", "vzmigrate", "vzpkg", "vzcluster", "vzckpt", "vznode"] {
            link(name, "vz")?;
        }
        Ok(())
    }
}

fn same_file(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (open.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_plain_and_short() {
        for name in ["a", "demo", "Test12"] {
            assert!(Layout::new(Path::new("/x"), name).is_ok(), "{name}");
        }
        for name in ["", "a-b", "../x", "a.b", "averylongname", "ä"] {
            assert!(Layout::new(Path::new("/x"), name).is_err(), "{name}");
        }
    }
}
