//! Files of `/dev/net/tun`: the programs' ends of tun and tap links.
//!
//! The links themselves are part of the network. There they are made to stay without a file; here
//! the files are attached to them, and a link that is to go with its last file is told so. The
//! frames that no program has read yet are read out, and sent to the link once more: on the target,
//! or on the source if the VE goes on there.

mod filter;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{Kind, TunFile, TunQueue};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    path,
    rebuild::{RebuildError, Target, lossy},
    socket::{Network, Networks},
    unix::diagnosis::{half, word},
};
use crate::sys::{
    ethtool,
    namespace::in_network_of,
    packet::{FrameHeader, PacketSender},
    socket::{self as sys_socket, Along},
    tap::{FRAME_MAX, VNET_HEADER},
    tun::{self, Change, Query},
};

/// Major and minor number of the device.
const DEVICE: (u32, u32) = (10, 200);

/// The most that is read out of one queue, in bytes. What is beyond is lost.
const FRAMES_BYTES_MAX: usize = 16 << 20;

/// The flags that a file is attached with.
const LASTING: u16 =
    tun::TUN | tun::TAP | tun::NAPI | tun::NAPI_FRAGS | tun::MULTI_QUEUE | tun::VNET_HEADER;

/// What a reader can do in the place of the kernel, by the names of the features that it makes.
const OFFLOADS: [(&str, u32); 7] = [
    ("tx-checksum-ip-generic", 0x1),
    ("tx-tcp-segmentation", 0x2),
    ("tx-tcp6-segmentation", 0x4),
    ("tx-tcp-ecn-segmentation", 0x8),
    ("tx-udp-segmentation", 0x60),
    ("tx-udp_tnl-segmentation", 0x80),
    ("tx-udp_tnl-csum-segmentation", 0x100),
];

/// Whether it is such a file.
pub(super) fn is_tun(object: &Object) -> bool {
    let number = (libc::major(object.status.special), libc::minor(object.status.special));
    object.file_type() == libc::S_IFCHR && number == DEVICE
}

/// The network where its link is, or where it would make one.
pub(super) fn network<'a>(networks: &'a Networks, object: &Object) -> Result<&'a Network, Refusal> {
    let namespace = match tun::attachment(object.fd())? {
        Some(_) => tun::network_of_link(object.fd())?,
        None => tun::network(object.fd())?,
    };
    networks.of_namespace(namespace.as_fd())
}

/// Refuses what the kernel does not tell.
pub(super) fn check(networks: &Networks, object: &Object) -> Result<(), Refusal> {
    network(networks, object)?;
    let Some((_, flags)) = tun::attachment(object.fd())? else { return Ok(()) };
    if tun::had_filter(object.fd())? {
        // When a queue is attached the kernel reads the filter once more, from where the program had
        // it then.
        if flags & tun::MULTI_QUEUE != 0 {
            let what = "a tap link with a filter (TUNATTACHFILTER) and several queues";
            return Err(Refusal::new(what, "end the program"));
        }
        if !filter::is_readable() {
            let what =
                "a tap link with a filter (TUNATTACHFILTER), which this kernel does not show";
            return Err(Refusal::new(what, "end the program"));
        }
    }
    Ok(())
}

/// What the kernel tells about a link by netlink alone.
struct Told {
    /// A header before each frame says what protocol it is of.
    header: bool,
    carrier: bool,
}

/// Asks about a link of the network of the calling thread.
fn ask(link: &str) -> io::Result<Told> {
    const ERROR: u16 = 2;
    const NEW_LINK: u16 = 16;
    const GET_LINK: u16 = 18;
    const REQUEST: u16 = 1;
    const NAME: u16 = 3;
    const INFO: u16 = 18;
    const CARRIER: u16 = 33;
    const INFO_DATA: u16 = 2;
    const HEADER: u16 = 4;
    let netlink = sys_socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    let mut body = vec![0; 16];
    body.extend((4 + link.len() as u16 + 1).to_ne_bytes());
    body.extend(NAME.to_ne_bytes());
    body.extend(link.as_bytes());
    body.push(0);
    body.resize(body.len().next_multiple_of(4), 0);
    let mut request = (16 + body.len() as u32).to_ne_bytes().to_vec();
    request.extend(GET_LINK.to_ne_bytes());
    request.extend(REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    sys_socket::send(netlink.as_fd(), &request, &Along::default(), 0)?;
    let mut answer = vec![0; 32 << 10];
    let length = sys_socket::receive(netlink.as_fd(), &mut answer, 0)?.length;
    let attributes = match half(&answer, 4)? {
        NEW_LINK => answer.get(32..length).ok_or(io::ErrorKind::InvalidData)?,
        ERROR => return Err(io::Error::from_raw_os_error(-word(&answer, 16)?.cast_signed())),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let info = attribute(attributes, INFO).and_then(|info| attribute(info, INFO_DATA));
    let is_set = |value: Option<&[u8]>| value.is_some_and(|value| value.first() != Some(&0));
    Ok(Told {
        header: is_set(info.and_then(|info| attribute(info, HEADER))),
        carrier: is_set(attribute(attributes, CARRIER)),
    })
}

/// The first netlink attribute of a kind.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    const KIND: u16 = 0x3fff;
    loop {
        let length = usize::from(half(bytes, 0).ok()?);
        let value = bytes.get(4..length)?;
        if half(bytes, 2).ok()? & KIND == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

pub(super) fn capture(capture: &mut Capture<'_>, place: usize) -> Result<Kind, Refusal> {
    check(&capture.networks, &capture.found.objects[place])?;
    let Kind::Path(mut node) = path::capture(capture, place)? else {
        return Err(io::Error::from(io::ErrorKind::InvalidData).into());
    };
    // It counts what was read, and cannot be set.
    node.offset = 0;
    let object = &capture.found.objects[place];
    let namespace = network(&capture.networks, object)?.namespace()?;
    let Some((link, flags)) = tun::attachment(object.fd())? else {
        return Ok(Kind::Tun(Box::new(TunFile { node, queue: None })));
    };
    let (told, features) =
        in_network_of(namespace.as_fd(), || Ok((ask(&link)?, ethtool::features(&link)?)))?;
    let on = |(name, _): &&(&str, u32)| features.iter().any(|on| on == name);
    let number = |query| tun::query(object.fd(), query);
    let mut queue = TunQueue {
        flags: flags & LASTING | if told.header { 0 } else { tun::NO_HEADER },
        persistent: flags & tun::PERSIST != 0,
        detached: flags & tun::DETACH_QUEUE != 0,
        carrier: told.carrier,
        send_buffer: number(Query::SendBuffer)?,
        header_size: number(Query::HeaderSize)?,
        little_endian: number(Query::LittleEndian)? != 0,
        offload: OFFLOADS.iter().filter(on).map(|(_, bits)| bits).sum(),
        filter: match tun::had_filter(object.fd())? {
            true => filter::read(capture.source, object)?,
            false => Vec::new(),
        },
        frames: Vec::new(),
        link,
    };
    let kept = object.fd().try_clone_to_owned()?;
    queue.frames = read_out(object.fd())?;
    capture.undo.frames.extend(Taken::new(kept, namespace, &queue));
    Ok(Kind::Tun(Box::new(TunFile { node, queue: Some(queue) })))
}

fn read_out(file: BorrowedFd<'_>) -> io::Result<Vec<serde_bytes::ByteBuf>> {
    let (mut frames, mut bytes) = (Vec::new(), 0);
    let mut buffer = vec![0; FRAME_MAX + 64];
    while bytes < FRAMES_BYTES_MAX {
        // Of a queue that takes no part nothing can be read, and a link that is down has none.
        let Ok(Some(length)) = tun::read_waiting(file, &mut buffer) else { break };
        let frame = buffer.get(..length).unwrap_or_default();
        frames.push(serde_bytes::ByteBuf::from(frame));
        bytes += length;
    }
    Ok(frames)
}

/// Frames that were read out of a queue of the source. Dropping it puts them back.
#[derive(Debug)]
pub(super) struct Taken {
    /// Keeps the link, which may be there for this file alone.
    _file: OwnedFd,
    network: OwnedFd,
    queue: Option<TunQueue>,
}

impl Taken {
    fn new(file: OwnedFd, network: OwnedFd, queue: &TunQueue) -> Option<Self> {
        let queue = (!queue.frames.is_empty()).then(|| queue.clone());
        queue.is_some().then_some(Self { _file: file, network, queue })
    }

    /// The VE does not go on here.
    pub(super) fn seal(mut self) {
        self.queue = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(queue) = &self.queue else { return };
        if let Err(error) = in_network_of(self.network.as_fd(), || put_back(queue)) {
            tracing::warn!(%error, link = queue.link, "frames that waited for a program are lost");
        }
    }
}

/// Sends the frames of a queue to its link again, in the network of the calling thread.
fn put_back(queue: &TunQueue) -> io::Result<()> {
    if queue.frames.is_empty() {
        return Ok(());
    }
    let index = nix::net::if_::if_nametoindex(queue.link.as_str())?;
    let has = |flag| queue.flags & flag != 0;
    let header = if has(tun::VNET_HEADER) { FrameHeader::Vnet } else { FrameHeader::None };
    let sender = PacketSender::open(index, header)?;
    sender.go_straight()?;
    // Before a frame stand what says of which protocol it is, and the header of a virtual card,
    // which can be longer than it is taken.
    let protocol = if has(tun::NO_HEADER) { 0 } else { 4 };
    let size = usize::try_from(queue.header_size).unwrap_or(VNET_HEADER).max(VNET_HEADER);
    for frame in &queue.frames {
        let rest = frame.get(protocol..).unwrap_or_default();
        let sent = match header {
            FrameHeader::None => sender.send(rest),
            FrameHeader::Vnet => match rest.split_at_checked(size) {
                Some((header, frame)) => sender.send(&[&header[..VNET_HEADER], frame].concat()),
                None => Err(io::ErrorKind::InvalidData.into()),
            },
        };
        // The link may be down by now, which loses frames on every host.
        if let Err(error) = sent {
            tracing::debug!(%error, link = queue.link, "a frame for a program is lost");
        }
    }
    Ok(())
}

/// Opens the device again, and makes it a queue of its link. The calling thread is in the network
/// and the mount namespace of the file.
pub(super) fn rebuild(
    target: &Target,
    file: &TunFile,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let opened = path::rebuild(target, &file.node, flags)?;
    if let Some(queue) = &file.queue {
        let failed = |source| RebuildError::Link { name: lossy(queue.link.as_bytes()), source };
        attach(opened.as_fd(), queue).map_err(failed)?;
    }
    Ok(opened)
}

fn attach(file: BorrowedFd<'_>, queue: &TunQueue) -> io::Result<()> {
    // The link stands without a file, so this can make none.
    nix::net::if_::if_nametoindex(queue.link.as_str())?;
    tun::attach(file, &queue.link, queue.flags)?;
    tun::change(file, Change::Persist, i32::from(queue.persistent))?;
    tun::change(file, Change::SendBuffer, queue.send_buffer)?;
    tun::change(file, Change::HeaderSize, queue.header_size)?;
    if queue.little_endian {
        tun::change(file, Change::LittleEndian, 1)?;
    }
    tun::change(file, Change::Offload, queue.offload.cast_signed())?;
    if queue.detached {
        return tun::set_queue(file, tun::DETACH_QUEUE);
    }
    if !queue.carrier {
        tun::change(file, Change::Carrier, 0)?;
    }
    if !queue.filter.is_empty() {
        tun::attach_filter(file, &queue.filter)?;
    }
    put_back(queue)
}
