//! Links of the kind tun: packets or frames that go to a program and come from it.
//!
//! They are not made by netlink but by a file of `/dev/net/tun`, and go with it unless they are told
//! to stay. Here they are made to stay: the files of the programs are attached to them later, and
//! say then whether that is so.

use std::{fs::File, io, os::fd::AsFd};

use ckpt_engine::sys::{
    netns::Netns,
    tun::{self, Change},
};
use ckpt_format::network::{Link, Made};

use super::{
    attributes::{number, put, value, without},
    made,
};
use crate::network::{NetworkError, netlink::Netlink};

const OWNER: u16 = 1;
const GROUP: u16 = 2;
const TYPE: u16 = 3;
/// A header before each frame says of which protocol it is.
const PROTOCOL_HEADER: u16 = 4;
const VNET_HEADER: u16 = 5;
const MULTI_QUEUE: u16 = 7;

/// How many users and groups a VE has.
const ID_COUNT: u32 = ckpt_engine::container::ID_COUNT;

/// The settings with users and groups as the VE numbers them; `None` for one that is none of its.
pub(super) fn inside(settings: &[u8], id_base: u32) -> Option<Vec<u8>> {
    let mut inside = without(settings, &[OWNER, GROUP]);
    for kind in [OWNER, GROUP] {
        if let Some(id) = number(settings, kind) {
            let id = id.checked_sub(id_base).filter(|&id| id < ID_COUNT)?;
            put(&mut inside, kind, &id.to_ne_bytes());
        }
    }
    Some(inside)
}

/// Makes a link that stays without a file, down.
pub(super) fn make(
    netlink: &mut Netlink,
    netns: &Netns,
    link: &Link,
    made: &Made,
    id_base: u32,
) -> Result<(), NetworkError> {
    let make = || make_here(link, made, id_base);
    netns
        .run(make)
        .and_then(std::convert::identity)
        .map_err(|source| NetworkError::Link { name: link.name.clone(), source })?;
    let Some(mac) = link.mac else { return Ok(()) };
    made::set_address(netlink, &link.name, mac)
}

fn make_here(link: &Link, made: &Made, id_base: u32) -> io::Result<()> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let byte = |kind| value(&made.settings, kind).and_then(|value| value.first()).copied();
    let is_set = |kind| byte(kind).is_some_and(|byte| byte != 0);
    // `IFF_TUN` and `IFF_TAP`.
    let mut flags = match byte(TYPE) {
        Some(kind @ (1 | 2)) => u16::from(kind),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    for (flag, on) in [
        (tun::NO_HEADER, !is_set(PROTOCOL_HEADER)),
        (tun::VNET_HEADER, is_set(VNET_HEADER)),
        (tun::MULTI_QUEUE, is_set(MULTI_QUEUE)),
    ] {
        flags |= if on { flag } else { 0 };
    }
    if link.index != 0 {
        tun::choose_index(file.as_fd(), link.index)?;
    }
    tun::attach(file.as_fd(), &link.name, flags)?;
    tun::change(file.as_fd(), Change::Persist, 1)?;
    for (kind, change) in [(OWNER, Change::Owner), (GROUP, Change::Group)] {
        if let Some(id) = number(&made.settings, kind) {
            let id = id.checked_add(id_base).filter(|_| id < ID_COUNT);
            let id = id.ok_or(io::ErrorKind::InvalidData)?;
            tun::change(file.as_fd(), change, id.cast_signed())?;
        }
    }
    Ok(())
}
