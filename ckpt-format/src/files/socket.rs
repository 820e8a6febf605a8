//! Sockets with their queues and options.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{File, FileId, Kind};

/// One socket option that differs from that of a fresh socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SOL_*` or `IPPROTO_*`.
    pub level: i32,
    /// `SO_*` and the like.
    pub name: i32,
    /// The value as setsockopt(2) takes it.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Whom a unix socket shows to its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct ucred")]
pub struct PeerCredentials {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub socket_type: i32,
    /// The name as it was bound: `sun_path` without the final NUL; abstract names start with NUL.
    pub name: Option<serde_bytes::ByteBuf>,
    /// The node in the file system, where the name has one that is this socket.
    pub node: Option<SocketNode>,
    /// How it is connected.
    pub state: UnixState,
    /// `SO_PEERCRED`, where the socket has any.
    pub peer_credentials: Option<PeerCredentials>,
    /// 1: no more reading, 2: no more writing, 3: both.
    pub shutdown: u8,
    /// Messages waiting to be read, oldest first. A stream keeps its data in as few messages as
    /// the descriptors and credentials in it allow.
    pub queue: Vec<UnixMessage>,
    /// The peer has gone without reading all, which waits to be told (`ECONNRESET`).
    #[serde(default)]
    pub reset: bool,
    /// The options.
    pub options: Vec<SocketOption>,
}

/// The connection of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixState {
    /// Not connected.
    Alone,
    /// Listening.
    Listening {
        /// listen(2).
        backlog: u32,
        /// The clients that wait to be accepted, oldest first; none for one that is gone again.
        pending: Vec<Option<FileId>>,
    },
    /// Connected to a socket of the VE. For datagrams one-way.
    Connected(FileId),
    /// Connected to a listener that has not accepted yet: it is in its `pending`.
    Pending,
    /// The peer has gone.
    PeerGone,
}

/// The node of a unix socket in the file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketNode {
    /// Where the node is now, inside the VE.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The mode bits.
    pub mode: u32,
    /// Owner inside the VE.
    pub uid: u32,
    /// Group inside the VE.
    pub gid: u32,
}

/// One message in the queue of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// The bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// The descriptors that travel with the first byte.
    pub files: Vec<FileId>,
    /// The credentials that travel with it.
    pub credentials: Option<PeerCredentials>,
    /// The name of the sender of a datagram.
    pub sender: Option<serde_bytes::ByteBuf>,
    /// It is one byte, and urgent (`MSG_OOB`).
    #[serde(default)]
    pub urgent: bool,
}

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// An IPv6 socket.
    pub v6: bool,
    /// Made for MPTCP: a listener, or a socket that is not connected.
    pub multipath: bool,
    /// The local address, when bound.
    pub local: Option<SocketAddr>,
    /// The state.
    pub state: TcpState,
    /// The options.
    pub options: Vec<SocketOption>,
}

/// The state of a TCP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TcpState {
    /// Neither listening nor connected, perhaps bound.
    Closed,
    /// Listening.
    Listening {
        /// listen(2).
        backlog: u32,
        /// The connections that wait to be accepted, oldest first.
        waiting: Vec<WaitingConnection>,
    },
    /// Waiting for the peer's answer to a connect(2).
    Connecting {
        /// Whom it connects to.
        remote: SocketAddr,
    },
    /// Has a peer.
    Connected(Box<TcpConnection>),
    /// Was connected; both ways are closed and nothing is left but what can still be read.
    Finished {
        /// What can still be read.
        unread: serde_bytes::ByteBuf,
        /// The error that waits to be told behind it (`SO_ERROR`); 0 for none.
        #[serde(default)]
        error: i32,
    },
}

/// A TCP connection by its ends, of which there is never more than one in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TcpEnds {
    /// As in [`File::network`].
    pub network: u32,
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

impl TcpEnds {
    /// Those of an open file, if it is a connection.
    pub fn of(file: &File) -> Option<Self> {
        let Kind::Tcp(tcp) = &file.kind else { return None };
        let TcpState::Connected(connection) = &tcp.state else { return None };
        Some(Self { network: file.network, local: tcp.local?, remote: connection.remote })
    }
}

/// What has changed in which connections of a running VE rest: nothing is on its way in them, and they
/// may be the same when the VE stops.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestingConnections {
    /// Those that rest now, or rest otherwise than told before. When they were looked at, and who has
    /// to be asked, is not told.
    pub rest: Vec<File>,
    /// Those that were told before and do not rest any more.
    pub wake: Vec<TcpEnds>,
}

/// A connection that its listener has not accepted yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingConnection {
    /// Our end, which the listener's address need not tell.
    pub local: SocketAddr,
    /// The rest.
    pub connection: TcpConnection,
}

/// A TCP connection as `TCP_REPAIR` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// The other end.
    pub remote: SocketAddr,
    /// Which ways are closed.
    pub closing: TcpClosing,
    /// Bytes received and not read yet; they end at `receive_sequence`.
    #[serde(with = "serde_bytes")]
    pub unread: Vec<u8>,
    /// The sequence number behind the last byte received (and the peer's FIN).
    pub receive_sequence: u32,
    /// Bytes written and not acknowledged; they end at `send_sequence`.
    #[serde(with = "serde_bytes")]
    pub unacknowledged: Vec<u8>,
    /// How many of those bytes, at the end, were never sent.
    pub unsent: u32,
    /// The sequence number behind the last byte written (and our FIN).
    pub send_sequence: u32,
    /// The segment size that the peer accepts.
    pub segment_size: u32,
    /// The window scales (ours for sending, ours for receiving), when negotiated.
    pub window_scale: Option<(u8, u8)>,
    /// Selective acknowledgements were negotiated.
    pub selective_acknowledgement: bool,
    /// Our timestamp clock, when timestamps were negotiated.
    pub timestamp: Option<u32>,
    /// `struct tcp_repair_window`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// Everything is acknowledged, in both directions, and has been for a while: there is nothing
    /// that the peer could wait to hear of.
    #[serde(default)]
    pub quiet: bool,
}

impl TcpConnection {
    /// The peer has sent its FIN.
    pub fn closed_by_peer(&self) -> bool {
        matches!(self.closing, TcpClosing::ByPeer | TcpClosing::ByBoth)
    }

    /// We have sent our FIN, or will behind what is still to be sent.
    pub fn closed_by_us(&self) -> bool {
        matches!(self.closing, TcpClosing::ByUs | TcpClosing::ByBoth)
    }

    /// The sent and the unsent part of what is not acknowledged; `None` for contradicting data.
    pub fn split(&self) -> Option<(&[u8], &[u8])> {
        let sent = self.unacknowledged.len().checked_sub(self.unsent as usize)?;
        self.unacknowledged.split_at_checked(sent)
    }

    /// The sequence number of the first byte in `unacknowledged`.
    pub fn send_start(&self) -> u32 {
        let length = self.unacknowledged.len() as u32 + u32::from(self.closed_by_us());
        self.send_sequence.wrapping_sub(length)
    }

    /// The sequence number of the first byte in `unread`.
    pub fn receive_start(&self) -> u32 {
        let length = self.unread.len() as u32 + u32::from(self.closed_by_peer());
        self.receive_sequence.wrapping_sub(length)
    }
}

/// Which ways of a TCP connection are closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TcpClosing {
    /// None: established.
    Open,
    /// The peer has closed: `CLOSE_WAIT`.
    ByPeer,
    /// We have closed: `FIN_WAIT1`, `FIN_WAIT2`.
    ByUs,
    /// Both: `LAST_ACK`, `CLOSING`.
    ByBoth,
}

/// A socket of UDP, UDP-Lite or echo requests (ping), or a raw one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpSocket {
    /// An IPv6 socket.
    pub v6: bool,
    /// Raw: it sees whole packets of its protocol.
    pub raw: bool,
    /// `IPPROTO_*`.
    pub protocol: i32,
    /// The local address, when bound.
    pub local: Option<SocketAddr>,
    /// The remote address, when connected.
    pub remote: Option<SocketAddr>,
    /// Datagrams waiting to be read, with their senders. Only of UDP: replies to a ping and raw
    /// packets cannot be read without being consumed, and may be lost at any time.
    pub queue: Vec<Datagram>,
    /// The error that waits to be told before them (`SO_ERROR`); 0 for none.
    #[serde(default)]
    pub error: i32,
    /// A datagram that is written in parts and not sent.
    #[serde(default)]
    pub corked: Option<Corked>,
    /// The multicast groups that it has joined.
    pub groups: Vec<Membership>,
    /// The options.
    pub options: Vec<SocketOption>,
}

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub sender: SocketAddr,
    /// The bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// What is written of a datagram that is not sent yet (`UDP_CORK`, `MSG_MORE`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corked {
    /// To whom it goes.
    pub receiver: SocketAddr,
    /// The bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// A multicast group that a socket has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The number of the device.
    pub device: u32,
    /// The group.
    pub group: IpAddr,
    /// Only what these send is received, or with `exclude` what all others send.
    pub sources: Vec<IpAddr>,
    /// See `sources`.
    pub exclude: bool,
}

/// A socket that sends and receives whole frames (`AF_PACKET`). What waits in it is lost, but for
/// what is in its ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSocket {
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub socket_type: i32,
    /// The EtherType as it is on the wire.
    pub protocol: [u8; 2],
    /// The number of the device; 0 for all.
    pub device: u32,
    /// Addresses and modes that it has asked the device for.
    pub memberships: Vec<PacketMembership>,
    /// The options.
    pub options: Vec<SocketOption>,
    /// The memory that it receives into.
    #[serde(default)]
    pub ring: Option<PacketRing>,
    /// The memory that it sends from, which is mapped behind it.
    #[serde(default)]
    pub sent: Option<PacketRing>,
    /// Where both are mapped, always as a whole.
    #[serde(default)]
    pub maps: Vec<PacketMap>,
}

impl PacketSocket {
    /// Its rings, in the order in which they are mapped.
    pub fn rings(&self) -> impl Iterator<Item = &PacketRing> {
        self.ring.iter().chain(&self.sent)
    }
}

/// Memory of the kernel that a packet socket receives into (`PACKET_RX_RING`), or sends from
/// (`PACKET_TX_RING`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketRing {
    /// `TPACKET_V1` and so on: 0, 1, 2.
    pub version: u32,
    /// `struct tpacket_req3`: size and number of blocks, size and number of frames, milliseconds
    /// until a block is handed over, private bytes of a block, features.
    pub layout: [u32; 7],
    /// Where the kernel puts or takes the next frame; of version 3, which block it is filling.
    pub position: u32,
    /// What the program has not given back yet: frames, or blocks of version 3, by their number. Of
    /// what is sent all frames in which something is.
    pub unread: Vec<(u32, serde_bytes::ByteBuf)>,
    /// Where it is mapped, in images that do not say it of the socket.
    pub maps: Vec<PacketMap>,
}

/// One map of the rings of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketMap {
    /// The process inside the VE.
    pub pid: i32,
    /// The address.
    pub start: u64,
    /// `PROT_*`.
    pub protection: u8,
}

/// One `PACKET_ADD_MEMBERSHIP`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketMembership {
    /// The number of the device.
    pub device: u32,
    /// `PACKET_MR_*`.
    pub kind: u16,
    /// The hardware address, empty for a mode.
    #[serde(with = "serde_bytes")]
    pub address: Vec<u8>,
    /// How often it was asked for.
    pub count: u32,
}

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub socket_type: i32,
    /// `NETLINK_*`.
    pub protocol: i32,
    /// The port number, 0 when not bound.
    pub port: u32,
    /// The groups joined.
    pub groups: Vec<u32>,
    /// The first of the messages that wait to be read; the kernel shows no other. An answer is
    /// asked for again on the target; news that came unasked are lost.
    pub waiting: Option<serde_bytes::ByteBuf>,
    /// Something waits behind it: behind the only answer to a question, its acknowledgement.
    #[serde(default)]
    pub more: bool,
    /// The options.
    pub options: Vec<SocketOption>,
}
