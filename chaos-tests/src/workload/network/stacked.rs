//! Links that stand on other links, of those kinds that the kernel has.

use std::time::Duration;

use super::wire::{
    ADDRESS, Attributes, CONTROLLER, INFO, MTU, NAME, NAMESPACE, Named, PARENT, Wire, ip,
};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const KEPT: [u16; 5] = [ADDRESS, MTU, PARENT, CONTROLLER, INFO];

/// What is made: the kind, the name, on what it stands, and its settings.
fn links(base: u32) -> Vec<(&'static str, &'static str, Attributes)> {
    let on = |kind, name, data| {
        let link = Attributes::default().text(NAME, name).number(PARENT, base);
        (kind, name, link.info(kind, data))
    };
    let alone =
        |kind, name, data| (kind, name, Attributes::default().text(NAME, name).info(kind, data));
    let vxlan = Attributes::default()
        .number(1, 4242)
        .number(3, base)
        .with(4, &ip(50, 1))
        .with(5, &[33])
        .with(7, &[0])
        .with(15, &4789u16.to_be_bytes());
    vec![
        on("macvlan", "on-base", Attributes::default().number(1, 4)),
        on("macvtap", "tap-on-base", Attributes::default().number(1, 4)),
        alone("vxlan", "tunnel", vxlan),
        alone("ifb", "intermediate", Attributes::default()),
        alone("dummy", "nothing", Attributes::default()),
        on("vlan", "in-vlan", Attributes::default().with(1, &7u16.to_ne_bytes())),
    ]
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let wire = Wire::open()?;
    let network = Named::new(context, "netns-stacked", "upper")?;
    wire.pair("base", "base-far", &network)?;
    wire.address("base", ip(50, 1))?;
    wire.up("base")?;
    let base = wire.index("base")?;
    let mut made = Vec::new();
    for (kind, name, attributes) in links(base) {
        // Kernels differ in what they have; each has some of these.
        if wire.make(attributes).is_ok() {
            wire.up(name)?;
            made.push((kind, name));
        }
    }
    ensure(!made.is_empty(), || "this kernel has none of these links".to_owned())?;
    // One that stands in another network on a link of ours.
    let descriptor = network.open()?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&descriptor).to_ne_bytes();
    let across = Attributes::default()
        .text(NAME, "across")
        .number(PARENT, base)
        .with(NAMESPACE, &number)
        .info("macvlan", Attributes::default().number(1, 4));
    let is_across = wire.make(across).is_ok();
    drop(descriptor);
    let upper = Child::start(context, "upper", |stop| {
        let wire = network.enter()?;
        let names: &[&str] = if is_across { &["across", "base-far"] } else { &["base-far"] };
        let look = || {
            let each = names.iter().map(|name| wire.describe(name, &[ADDRESS, MTU, INFO, PARENT]));
            each.collect::<Result<Vec<_>, _>>()
        };
        let before = look()?;
        while !stop.wait(Duration::from_millis(10))? {
            same("links above", look()?, before.clone())?;
        }
        Ok(())
    })?;
    let look = || {
        let each = made.iter().map(|(_, name)| wire.describe(name, &KEPT));
        each.collect::<Result<Vec<_>, _>>()
    };
    let before = look()?;
    while context.step(Duration::from_millis(10))? {
        upper.check()?;
        for ((link, found), expected) in made.iter().zip(look()?).zip(&before) {
            same(link.0, &found, expected)?;
        }
        if context.progress.plant() {
            let (_, name) = made[0];
            wire.change(name, Attributes::default().number(MTU, 1280))?;
        }
    }
    upper.finish()?;
    for (_, name) in made.iter().rev() {
        wire.remove(name)?;
    }
    wire.remove("base")
}
