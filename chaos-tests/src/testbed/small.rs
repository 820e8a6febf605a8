//! Nodes that have less than the machine: what a full disk or a lack of memory does is seen on
//! these.

use std::{fs, str::FromStr};

use nix::mount::{MsFlags, mount};
use node::cgroup::{Controller, Hierarchies};

use super::{
    Options, TestbedError, cgroups,
    names::{Host, Layout},
    system,
};

/// Gives the nodes that are to be small their own disk and their limit of memory.
pub(super) fn make(layout: &Layout, options: &Options) -> Result<(), TestbedError> {
    for (node, bytes) in &options.disks {
        let state = layout.state(node);
        fs::create_dir_all(&state).map_err(system("make", &state))?;
        let size = format!("size={bytes},mode=755");
        mount(Some("tmpfs"), &state, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .map_err(|errno| system("mount a disk at", &state)(errno.into()))?;
    }
    for (node, bytes) in &options.memory {
        let missing = || system("limit the memory of", node.to_string());
        let found = Hierarchies::find().map_err(|_| missing()(std::io::ErrorKind::NotFound.into()));
        let found = found?;
        let legacy = found.legacy.iter().find(|(controller, _)| *controller == Controller::Memory);
        let (top, file) = match legacy {
            Some((_, top)) => (top, "memory.limit_in_bytes"),
            None => (&found.unified, "memory.max"),
        };
        let ves = top.join(cgroups::of_ves(layout, node));
        fs::create_dir_all(&ves).map_err(system("make", &ves))?;
        let limit = ves.join(file);
        fs::write(&limit, bytes.to_string()).map_err(system("write", &limit))?;
    }
    Ok(())
}

/// How much of something a node has, as `testbed up` takes it: `node2=300M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The node.
    pub node: Host,
    /// How much, in bytes.
    pub bytes: u64,
}

/// The text is no share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not like node2=300M: a node, and at least 1M in K, M or G")]
pub struct NotAShare {
    text: String,
}

impl FromStr for Share {
    type Err = NotAShare;

    fn from_str(text: &str) -> Result<Self, NotAShare> {
        let parse = || {
            let (node, size) = text.split_once('=')?;
            let number: u8 = node.strip_prefix("node")?.parse().ok()?;
            let shift = match size.bytes().last()? {
                b'K' => 10,
                b'M' => 20,
                b'G' => 30,
                _ => return None,
            };
            let count: u64 = size[..size.len() - 1].parse().ok()?;
            let bytes = count.checked_mul(1 << shift)?;
            let node = Host::Node(number);
            (number > 0 && bytes >= 1 << 20).then_some(Self { node, bytes })
        };
        parse().ok_or_else(|| NotAShare { text: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_names_a_node_and_a_size() {
        let share = Share { node: Host::Node(2), bytes: 300 << 20 };
        assert_eq!("node2=300M".parse(), Ok(share));
        for text in ["", "node2", "node0=1G", "client=1G", "node2=300", "node2=1K", "node2=é"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }
}
