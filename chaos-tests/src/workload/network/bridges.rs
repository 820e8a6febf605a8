//! A bridge between two networks.

use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use super::elsewhere::{answer, connect, talk};
use super::wire::{ADDRESS, Attributes, CONTROLLER, MTU, NAME, NAMESPACE, Named, Wire, host, ip};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::Child;

const MAC: [u8; 6] = [2, 0x42, 0, 0, 0, 0x17];

/// Settings of the bridge and its ports that are not those that the kernel begins with.
const BRIDGE: [&str; 5] =
    ["ageing_time", "forward_delay", "priority", "multicast_snooping", "group_fwd_mask"];
const PORT: [&str; 4] = ["hairpin_mode", "isolated", "path_cost", "unicast_flood"];

fn look() -> Result<String, Failure> {
    let mut text = String::new();
    for name in BRIDGE {
        text += &fs::read_to_string(format!("/sys/class/net/made-bridge/bridge/{name}"))?;
    }
    for port in ["port-one", "port-two"] {
        for name in PORT {
            text += &fs::read_to_string(format!("/sys/class/net/{port}/brport/{name}"))?;
        }
    }
    Ok(text)
}

/// Adds an entry for a station behind a port.
fn station(wire: &Wire) -> Result<(), Failure> {
    let mut body = vec![7, 0, 0, 0];
    body.extend(wire.index("port-one")?.to_ne_bytes());
    // Static, of the bridge.
    body.extend([0x40, 0, 4, 0]);
    body.extend(Attributes::default().with(2, &MAC).0);
    wire.ask(28, 0x600, &body).map(drop)
}

/// Whether the entry is there: then it cannot be made.
fn has_station(wire: &Wire) -> bool {
    station(wire).is_err()
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let wire = Wire::open()?;
    let settings = Attributes::default()
        .number(1, 300)
        .number(4, 12_000)
        .with(6, &4096u16.to_ne_bytes())
        .with(9, &8u16.to_ne_bytes())
        .with(23, &[0]);
    wire.make(Attributes::default().text(NAME, "made-bridge").info("bridge", settings))?;
    wire.address("made-bridge", ip(40, 254))?;
    wire.up("made-bridge")?;
    let index = wire.index("made-bridge")?;
    let mut servers = Vec::new();
    for (name, port, number) in [("one", "port-one", 1), ("two", "port-two", 2)] {
        let network = Named::new(context, "netns-bridge", name)?;
        wire.pair(port, "inner", &network)?;
        wire.change(port, Attributes::default().number(CONTROLLER, index))?;
        wire.up(port)?;
        let server = Child::start(context, name, |stop| {
            let wire = network.enter()?;
            wire.address("inner", ip(40, number))?;
            wire.up("inner")?;
            let listener = TcpListener::bind((host(40, number), 7004))?;
            if number == 1 {
                return answer(&listener, stop);
            }
            // Through the bridge to the other network.
            let mut other = connect((host(40, 1), 7004).into())?;
            let mut turn = 0;
            while !stop.wait(Duration::from_millis(5))? {
                turn += 1;
                talk(&mut other, turn)?;
            }
            Ok(())
        })?;
        servers.push((server, network));
    }
    let port = Attributes::default().with(4, &[1]).with(9, &[0]).number(3, 55);
    let info = Attributes::default().text(4, "bridge").nested(5, port);
    wire.change("port-one", Attributes::default().nested(18, info))?;
    station(&wire)?;
    let mut outer = connect((host(40, 1), 7004).into())?;
    let kept = [ADDRESS, MTU, CONTROLLER, NAMESPACE];
    let before = (look()?, wire.describe("made-bridge", &kept)?, wire.describe("port-one", &kept)?);
    let mut number = 0;
    while context.step(Duration::from_millis(5))? {
        number += 1;
        servers.iter().try_for_each(|(server, _)| server.check())?;
        talk(&mut outer, number)?;
        let now =
            (look()?, wire.describe("made-bridge", &kept)?, wire.describe("port-one", &kept)?);
        same("bridge and port", now, before.clone())?;
        same("a station behind a port", has_station(&wire), true)?;
        if context.progress.plant() {
            let port = Attributes::default().number(3, 56);
            let info = Attributes::default().text(4, "bridge").nested(5, port);
            wire.change("port-one", Attributes::default().nested(18, info))?;
        }
    }
    // A network that goes takes its end of a pair along, and the other end with that.
    let mut networks = Vec::new();
    // The second one talks to the first.
    for (server, network) in servers.into_iter().rev() {
        server.finish()?;
        networks.push(network);
    }
    wire.remove("port-one")?;
    wire.remove("port-two")?;
    wire.remove("made-bridge")
}
