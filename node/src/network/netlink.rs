//! A small synchronous netlink client.
//!
//! The blackout of a migration contains netlink requests, and they are made from plain threads
//! that may have entered another network namespace. So there is no runtime here: a request is
//! one send and one receive on a socket that was opened beforehand. A socket stays in the
//! namespace in which it was opened.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use ckpt_engine::sys::netns::Netns;
use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE,
    NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Make a new object; it must not be there.
pub const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// Make the object, or change it into this.
pub const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;
/// Change or remove what is there.
pub const CHANGE: u16 = 0;

/// A dump that was disturbed by changes is asked for again this often.
const DUMP_ATTEMPTS: usize = 16;

/// Why a netlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("netlink socket")]
    Socket(#[from] io::Error),
    /// The kernel refused the request.
    #[error("the kernel refused to {what}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel's answer could not be read.
    #[error("netlink answer")]
    Malformed(#[source] DecodeError),
    /// The objects changed faster than they could be listed.
    #[error("the list kept changing while it was read")]
    Unstable,
}

impl NetlinkError {
    /// The error number, where the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A netlink socket and its buffer.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket for links, addresses and routes in the calling thread's namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Self::open_protocol(SockProtocol::NetlinkRoute)
    }

    /// Opens a socket for links, addresses and routes in `netns`.
    pub fn open_in(netns: &Netns) -> Result<Self, NetlinkError> {
        netns.run(Self::open)?
    }

    /// Opens a socket of another netlink family in the calling thread's namespace.
    pub fn open_protocol(protocol: SockProtocol) -> Result<Self, NetlinkError> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
            .map_err(io::Error::from)?;
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(io::Error::from)?;
        setsockopt(&fd, sockopt::RcvBuf, &(1 << 20)).map_err(io::Error::from)?;
        // The kernel answers before the send returns. An answer that never comes is a request
        // that we got wrong, and better an error than a daemon that waits for ever.
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(5)).map_err(io::Error::from)?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; 64 << 10] })
    }

    /// Makes one change and waits until the kernel has made it. `what` completes the sentence
    /// "the kernel refused to ...".
    pub fn change(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.change_all(what, [(message, flags)])
    }

    /// Makes several changes with one send. The first refusal is reported, but later changes
    /// have been tried as well.
    pub fn change_all(
        &mut self,
        what: &str,
        messages: impl IntoIterator<Item = (RouteNetlinkMessage, u16)>,
    ) -> Result<(), NetlinkError> {
        let mut bytes = Vec::new();
        let mut count = 0;
        for (message, flags) in messages {
            append(&mut bytes, message, NLM_F_REQUEST | NLM_F_ACK | flags, self.next_sequence());
            count += 1;
        }
        self.exchange(what, &bytes, count)
    }

    /// Sends bytes that hold `count` requests, each of which asks for an acknowledgement and
    /// carries the sequence numbers last given by [`Self::next_sequence`].
    pub fn exchange(&mut self, what: &str, bytes: &[u8], count: u32) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_sub(count);
        send_whole(&self.fd, bytes)?;
        let mut refused = None;
        let mut answered = 0;
        while answered < count {
            let length = self.receive()?;
            for_each(&self.buffer[..length], |header, payload| {
                // Left-overs of an earlier request that failed half way are of no interest.
                let ours = header.sequence_number.wrapping_sub(first).wrapping_sub(1) < count;
                if header.message_type == NLMSG_ERROR && ours {
                    answered += 1;
                    let code = i32_at(payload);
                    if code != 0 && refused.is_none() {
                        refused = Some(io::Error::from_raw_os_error(code.wrapping_neg()));
                    }
                }
                Ok(())
            })?;
        }
        match refused {
            Some(source) => Err(NetlinkError::Refused { what: what.into(), source }),
            None => Ok(()),
        }
    }

    /// The number of the next request.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Asks for one object.
    pub fn get(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, NetlinkError> {
        let mut found = self.list(what, message, 0)?;
        found.pop().ok_or_else(|| NetlinkError::Refused {
            what: what.into(),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        })
    }

    /// Lists objects. The list is consistent: when something changed meanwhile it is read again.
    pub fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            match self.list(what, message.clone(), NLM_F_DUMP) {
                Err(NetlinkError::Unstable) => {}
                result => return result,
            }
        }
        Err(NetlinkError::Unstable)
    }

    /// Sends one request for a list and counts the answers.
    pub fn count(
        &mut self,
        what: &str,
        bytes: &[u8],
        sequence: u32,
    ) -> Result<usize, NetlinkError> {
        send_whole(&self.fd, bytes)?;
        let mut count = 0;
        self.answers(what, sequence, |_| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// Sends one request for a list and returns the answers: type and body of each. The list is
    /// consistent: when something changed meanwhile it is read again.
    pub fn bodies(
        &mut self,
        what: &str,
        request: impl Fn(u32) -> Vec<u8>,
    ) -> Result<Vec<(u16, Vec<u8>)>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.next_sequence();
            send_whole(&self.fd, &request(sequence))?;
            let mut found = Vec::new();
            let disturbed = self.answers(what, sequence, |header| {
                found.push((header.message_type, header.bytes[HEADER..].to_vec()));
                Ok(())
            })?;
            if !disturbed {
                return Ok(found);
            }
        }
        Err(NetlinkError::Unstable)
    }

    fn list(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let sequence = self.next_sequence();
        let mut bytes = Vec::new();
        // A single object is followed by an acknowledgement, a dump by "done".
        let acknowledge = if flags == 0 { NLM_F_ACK } else { 0 };
        append(&mut bytes, message, NLM_F_REQUEST | acknowledge | flags, sequence);
        send_whole(&self.fd, &bytes)?;
        let mut found = Vec::new();
        let disturbed = self.answers(what, sequence, |header| {
            let message: NetlinkMessage<RouteNetlinkMessage> =
                NetlinkMessage::deserialize(header.bytes).map_err(NetlinkError::Malformed)?;
            if let NetlinkPayload::InnerMessage(message) = message.payload {
                found.push(message);
            }
            Ok(())
        })?;
        if disturbed { Err(NetlinkError::Unstable) } else { Ok(found) }
    }

    /// Calls `each` with every answer to a request, to the last one. True when the kernel says
    /// that the list changed meanwhile.
    fn answers(
        &mut self,
        what: &str,
        sequence: u32,
        mut each: impl FnMut(&Header<'_>) -> Result<(), NetlinkError>,
    ) -> Result<bool, NetlinkError> {
        let (mut done, mut disturbed, mut refused) = (false, false, None);
        while !done {
            let length = self.receive()?;
            for_each(&self.buffer[..length], |header, payload| {
                if header.sequence_number != sequence {
                    return Ok(());
                }
                disturbed |= header.flags & NLM_F_DUMP_INTR != 0;
                if !matches!(header.message_type, NLMSG_DONE | NLMSG_ERROR) {
                    return each(header);
                }
                done = true;
                let code = i32_at(payload);
                if code != 0 {
                    refused = Some(io::Error::from_raw_os_error(code.wrapping_neg()));
                }
                Ok(())
            })?;
        }
        match refused {
            Some(source) => Err(NetlinkError::Refused { what: what.into(), source }),
            None => Ok(disturbed),
        }
    }

    fn receive(&mut self) -> Result<usize, NetlinkError> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(length),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }
}

/// The length of a message's header.
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

struct Header<'a> {
    message_type: u16,
    flags: u16,
    sequence_number: u32,
    bytes: &'a [u8],
}

fn send_whole(fd: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    send(fd.as_raw_fd(), bytes, MsgFlags::empty())?;
    Ok(())
}

fn append(bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let start = bytes.len();
    bytes.resize((start + message.buffer_len()).next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// Calls `each` with every message in what was received at once.
fn for_each<'a>(
    mut bytes: &'a [u8],
    mut each: impl FnMut(&Header<'a>, &'a [u8]) -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    while !bytes.is_empty() {
        let buffer = NetlinkBuffer::new_checked(bytes).map_err(NetlinkError::Malformed)?;
        let length = usize::try_from(buffer.length()).expect("a u32 fits");
        let header = Header {
            message_type: buffer.message_type(),
            flags: buffer.flags(),
            sequence_number: buffer.sequence_number(),
            bytes: &bytes[..length],
        };
        each(&header, &bytes[16..length])?;
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(())
}

/// The number at the start of an error or done message. Both may be empty on old kernels.
fn i32_at(payload: &[u8]) -> i32 {
    payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes))
}
