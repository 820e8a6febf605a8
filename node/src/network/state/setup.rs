//! What is set of a link when it stands: names and notes, settings that differ, and of what it is a
//! port.

use ckpt_format::network::{Link, Port};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use super::{
    attributes::{different, put, put_nested, put_text, value},
    made::{
        CONTROLLER, GROUP, HEADER, INFO, INFO_DATA, INFO_KIND, NEW_LINK, NOTE, OTHER_NAME,
        PORT_DATA, PORT_KIND, PROPERTIES, SET_LINK, change, header, list,
    },
};
use crate::network::{NetworkError, netlink::Netlink};

const NEW_PROPERTIES: u16 = 108;

pub(super) fn change_names(
    netlink: &mut Netlink,
    link: &Link,
    found: &Link,
) -> Result<(), NetworkError> {
    let mut body = header(found.index);
    if link.group != found.group {
        put(&mut body, GROUP, &link.group.to_ne_bytes());
    }
    if link.note != found.note {
        put(&mut body, NOTE, link.note.clone().unwrap_or_default().as_bytes());
    }
    if body.len() > HEADER {
        change(netlink, "set up a link", SET_LINK, 0, &body)?;
    }
    let mut names = Vec::new();
    for name in link.other_names.iter().filter(|name| !found.other_names.contains(name)) {
        put_text(&mut names, OTHER_NAME, name);
    }
    if !names.is_empty() {
        let mut body = header(found.index);
        put_nested(&mut body, PROPERTIES, &names);
        change(
            netlink,
            "give a link its names",
            NEW_PROPERTIES,
            NLM_F_CREATE | NLM_F_APPEND,
            &body,
        )?;
    }
    Ok(())
}

pub(super) fn change_settings(
    netlink: &mut Netlink,
    link: &Link,
    found: &Link,
) -> Result<(), NetworkError> {
    let (Some(wanted), Some(made)) = (&link.made, &found.made) else { return Ok(()) };
    let left = different(&wanted.settings, &made.settings);
    if left.is_empty() {
        return Ok(());
    }
    let mut info = Vec::new();
    put_text(&mut info, INFO_KIND, &wanted.kind);
    put_nested(&mut info, INFO_DATA, &left);
    let mut body = header(found.index);
    put_nested(&mut body, INFO, &info);
    let what = format!("set up the {} link {}", wanted.kind, link.name);
    Ok(change(netlink, &what, NEW_LINK, 0, &body)?)
}

/// Makes a link a port of the link with the index `of`, or of none.
pub(super) fn change_port(
    netlink: &mut Netlink,
    link: &Link,
    found: &Link,
    of: u32,
) -> Result<(), NetworkError> {
    let names = |port: &Option<Port>| port.as_ref().map(|port| port.of.clone());
    let joins = names(&link.port) != names(&found.port);
    if joins {
        let mut body = header(found.index);
        put(&mut body, CONTROLLER, &of.to_ne_bytes());
        change(netlink, &format!("make {} a port", link.name), SET_LINK, 0, &body)?;
    }
    let Some(port) = &link.port else { return Ok(()) };
    let now = match &found.port {
        Some(port) if !joins => port.settings.clone(),
        _ => port_settings(netlink, found.index)?,
    };
    let left = different(&port.settings, &now);
    if left.is_empty() || port.kind.is_empty() {
        return Ok(());
    }
    let mut info = Vec::new();
    put_text(&mut info, PORT_KIND, &port.kind);
    put_nested(&mut info, PORT_DATA, &left);
    let mut body = header(found.index);
    put_nested(&mut body, INFO, &info);
    Ok(change(netlink, &format!("set up the port {}", link.name), NEW_LINK, 0, &body)?)
}

fn port_settings(netlink: &mut Netlink, index: u32) -> Result<Vec<u8>, NetworkError> {
    let list = list(netlink)?;
    let told = list.iter().find(|told| told.index == index);
    Ok(told.and_then(|told| value(told.info(), PORT_DATA)).unwrap_or_default().to_vec())
}
