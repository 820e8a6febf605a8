//! The LAN of a testbed: namespaces, links, cuts and speeds.

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{Cidr, Mac};
use nix::mount::{MsFlags, mount};
use node::network::{Bridge, BridgeConfig, Netlink, link::VethEnd, nftables};

use super::{
    TestbedError,
    names::{Host, LAN_PREFIX, Layout},
    rate::Rate,
    state::State,
    system,
};

/// The namespace with the bridge that joins the hosts.
const LAN: &str = "lan";
/// The namespace of whoever brought the testbed up: from there templates are downloaded.
pub(super) const OUTSIDE: &str = "outside";
/// The name of a node's interface to the LAN.
const UPLINK: &str = "uplink";
/// The bridge of a node.
pub(super) const NODE_BRIDGE: &str = "vzbr0";

/// Makes the namespaces and joins them.
pub(super) fn build(layout: &Layout, state: &State) -> Result<(), TestbedError> {
    let directory = Layout::netns_directory();
    std::fs::create_dir_all(directory).map_err(system("make", directory))?;
    pin_current(layout, OUTSIDE)?;
    let lan = make_netns(layout, LAN)?;
    let config = BridgeConfig { bridge: LAN.into(), uplink: None, addresses: Vec::new() };
    let bridge = inside(&lan, LAN, || Bridge::ensure(&config))??;
    for host in state.hosts() {
        let netns = make_netns(layout, &host.to_string())?;
        connect(&lan, &bridge, &netns, &host)?;
    }
    Ok(())
}

fn connect(lan: &Netns, bridge: &Bridge, netns: &Netns, host: &Host) -> Result<(), TestbedError> {
    let port = host.to_string();
    let name = match host {
        Host::Node(_) => UPLINK,
        Host::Client => "eth0",
    };
    let mut at_lan = Netlink::open_in(lan)?;
    let near = VethEnd { name: &port, mac: None, netns: None };
    let mac = Some(Mac::local(rand::random()));
    at_lan.add_veth(&near, &VethEnd { name, mac, netns: Some(netns) })?;
    let index = at_lan.index(&port)?;
    at_lan.keep_silent(index)?;
    at_lan.enslave(index, bridge.index)?;
    at_lan.set_up(index)?;

    let mut at_host = Netlink::open_in(netns)?;
    let loopback = at_host.index("lo")?;
    at_host.set_up(loopback)?;
    let address = Cidr::new(host.address().into(), LAN_PREFIX).expect("16 bits are not too many");
    match host {
        Host::Node(_) => {
            let config = BridgeConfig {
                bridge: NODE_BRIDGE.into(),
                uplink: Some(UPLINK.into()),
                addresses: vec![address],
            };
            inside(netns, &port, || Bridge::ensure(&config))??;
        }
        Host::Client => {
            let index = at_host.index(name)?;
            at_host.add_address(index, address)?;
            at_host.set_up(index)?;
        }
    }
    Ok(())
}

/// Makes the LAN let through exactly what the state says.
pub(super) fn apply_cuts(layout: &Layout, state: &State) -> Result<(), TestbedError> {
    let lan = layout.open_named_netns(LAN)?;
    let mut netlink = Netlink::open_in(&lan)?;
    let mut pairs = Vec::new();
    for (one, other) in &state.cuts {
        pairs.push((netlink.index(one)?, netlink.index(other)?));
    }
    Ok(inside(&lan, LAN, || nftables::drop_between(&pairs))??)
}

/// Limits both ends of a host's link.
pub(super) fn limit(layout: &Layout, host: &Host, rate: Option<Rate>) -> Result<(), TestbedError> {
    let name = match host {
        Host::Node(_) => UPLINK,
        Host::Client => "eth0",
    };
    let port = host.to_string();
    for (netns, link) in [(port.as_str(), name), (LAN, port.as_str())] {
        let mut netlink = Netlink::open_in(&layout.open_named_netns(netns)?)?;
        let index = netlink.index(link)?;
        match rate {
            Some(rate) => netlink.limit_rate(index, rate.bytes_per_s())?,
            None => netlink.lift_rate(index)?,
        }
    }
    Ok(())
}

fn make_netns(layout: &Layout, name: &str) -> Result<Netns, TestbedError> {
    let netns = Netns::create().map_err(system("make the namespace", name))?;
    inside(&netns, name, || pin_current(layout, name))??;
    Ok(netns)
}

/// Gives the calling thread's namespace a name.
fn pin_current(layout: &Layout, name: &str) -> Result<(), TestbedError> {
    let path = layout.netns_path(name);
    std::fs::File::create(&path).map_err(system("make", &path))?;
    let source = Some("/proc/thread-self/ns/net");
    mount(source, &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| system("mount the namespace", &path)(errno.into()))
}

fn inside<T: Send>(
    netns: &Netns,
    name: &str,
    work: impl FnOnce() -> T + Send,
) -> Result<T, TestbedError> {
    netns.run(work).map_err(system("enter the namespace", name))
}
