//! What the kernel keeps about the TCP sockets of a process, copied in one pass.
//!
//! A program in the kernel (a BPF iterator) is shown every open file of a process and copies the
//! structure behind those that are sockets. Where things are in it, the kernel itself describes
//! ([`Types`]). What is read is what the options of a socket are kept in; which of them can be told
//! by it, [`super::proof`] finds out. What else the kernel tells of a descriptor only in fdinfo, at
//! the cost of ten other calls, is read as well.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::{
    btf::Types,
    sys::bpf::{
        self, MapKind,
        code::{
            ADD, ADD_REGISTER, AND, COPY, Code, EXIT, IF_EQUAL, LOAD, LOAD_WORD, SET, SHIFT_LEFT,
            SHIFT_RIGHT, STORE, STORE_REGISTER, UNLESS_EQUAL, helper,
        },
    },
};

/// Members in which options are kept: structure, name, bits. A kernel that has them elsewhere is
/// one where the options do not show.
const MEMBERS: &[(&str, &str, u32)] = &[
    ("sock_common", "skc_reuse", 4),
    ("sock_common", "skc_reuseport", 1),
    ("sock_common", "skc_ipv6only", 1),
    ("sock_common", "skc_bound_dev_if", 32),
    ("sock_common", "skc_flags", 64),
    ("sock", "sk_filter", 64),
    ("sock", "sk_rcvlowat", 32),
    ("sock", "sk_priority", 32),
    ("sock", "sk_mark", 32),
    ("sock", "sk_peek_off", 32),
    ("sock", "sk_tsflags", 32),
    ("sock", "sk_bind_phc", 32),
    ("sock", "sk_rcvtimeo", 64),
    ("sock", "sk_sndtimeo", 64),
    ("sock", "sk_lingertime", 64),
    ("sock", "sk_max_pacing_rate", 64),
    ("sock", "sk_ll_usec", 32),
    ("sock", "sk_prefer_busy_poll", 8),
    ("sock", "sk_clockid", 8),
    ("sock", "sk_txtime_deadline_mode", 1),
    ("sock", "sk_txtime_report_errors", 1),
    ("inet_sock", "inet_flags", 64),
    ("inet_sock", "inet_opt", 64),
    ("inet_sock", "uc_ttl", 16),
    ("inet_sock", "uc_index", 32),
    ("inet_sock", "tos", 8),
    ("inet_sock", "min_ttl", 8),
    ("inet_sock", "pmtudisc", 8),
    ("inet_sock", "local_port_range", 32),
    ("inet_connection_sock", "icsk_syn_retries", 8),
    ("inet_connection_sock", "icsk_ca_ops", 64),
    ("inet_connection_sock", "icsk_user_timeout", 32),
    ("inet_connection_sock", "icsk_rto_max", 32),
    ("tcp_sock", "nonagle", 4),
    ("tcp_sock", "thin_lto", 1),
    ("tcp_sock", "recvmsg_inq", 1),
    ("tcp_sock", "keepalive_time", 32),
    ("tcp_sock", "keepalive_intvl", 32),
    ("tcp_sock", "keepalive_probes", 8),
    ("tcp_sock", "linger2", 32),
    ("tcp_sock", "notsent_lowat", 32),
    ("tcp_sock", "tcp_tx_delay", 32),
];

/// Those of an IPv6 socket.
const MEMBERS6: &[(&str, &str, u32)] = &[
    ("ipv6_pinfo", "opt", 64),
    ("ipv6_pinfo", "hop_limit", 16),
    ("ipv6_pinfo", "pmtudisc", 8),
    ("ipv6_pinfo", "tclass", 8),
    ("ipv6_pinfo", "frag_size", 32),
    ("ipv6_pinfo", "ucast_oif", 32),
    ("ipv6_pinfo", "rxopt", 16),
    ("ipv6_pinfo", "srcprefs", 8),
    ("ipv6_pinfo", "min_hopcount", 8),
];

/// Where a member is, in bytes; of one that is smaller than a byte, which bits.
#[derive(Clone, Copy, Debug)]
struct Member {
    at: usize,
    len: usize,
    mask: u8,
}

impl Member {
    /// `base` is where the structure begins.
    fn find(types: &Types, base: u32, member: &(&str, &str, u32)) -> Option<Self> {
        let &(structure, name, bits) = member;
        let bit = types.bit(structure, name).ok()?;
        let (at, len) = ((base + bit / 8) as usize, bits.div_ceil(8) as usize);
        let mask = if bits < 8 { (((1u16 << bits) - 1) << (bit % 8)) as u8 } else { 0xff };
        Some(Self { at, len, mask })
    }
}

/// Where everything is in the running kernel.
#[derive(Clone, Debug)]
struct Layout {
    /// The kernel's function that shows files.
    iterator: u32,
    file_inode: u32,
    file_private: u32,
    inode_mode: u32,
    inode_number: u32,
    inode_locks: u32,
    task_files: u32,
    files_table: u32,
    table_closing: u32,
    socket_sock: u32,
    /// Of a `struct sock`.
    family: usize,
    state: usize,
    protocol: usize,
    network: usize,
    /// What handles the data of a connection instead of TCP, such as TLS.
    upper: usize,
    members: Vec<Member>,
    members6: Vec<Member>,
    /// How much of it is copied.
    len: u32,
}

impl Layout {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        // Each of them begins with the one before.
        let nested = [
            types.offset("sock", "__sk_common")?,
            types.offset("inet_sock", "sk")?,
            types.offset("inet_connection_sock", "icsk_inet")?,
            types.offset("tcp_sock", "inet_conn")?,
            types.offset("tcp6_sock", "tcp")?,
        ];
        if nested != [0; 5] {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let v6 = types.offset("tcp6_sock", "inet6")?;
        let all = |base, members: &[(&str, &str, u32)]| -> Vec<Member> {
            members.iter().filter_map(|member| Member::find(&types, base, member)).collect()
        };
        let place = |structure, member| types.offset(structure, member).map(|at| at as usize);
        Ok(Self {
            iterator: types.function("bpf_iter_task_file")?,
            file_inode: types.offset("file", "f_inode")?,
            file_private: types.offset("file", "private_data")?,
            inode_mode: types.offset("inode", "i_mode")?,
            inode_number: types.offset("inode", "i_ino")?,
            inode_locks: types.offset("inode", "i_flctx")?,
            task_files: types.offset("task_struct", "files")?,
            files_table: types.offset("files_struct", "fdt")?,
            table_closing: types.offset("fdtable", "close_on_exec")?,
            socket_sock: types.offset("socket", "sk")?,
            family: place("sock_common", "skc_family")?,
            state: place("sock_common", "skc_state")?,
            protocol: place("sock", "sk_protocol")?,
            network: place("sock_common", "skc_net")?,
            upper: place("inet_connection_sock", "icsk_ulp_ops")?,
            members: all(0, MEMBERS),
            members6: all(v6, MEMBERS6),
            len: types.size("tcp6_sock")?,
        })
    }
}

/// One TCP socket, as the kernel keeps it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sight {
    /// Where.
    socket: u64,
    pub(super) v6: bool,
    pub(super) state: u8,
    /// Whether nothing but TCP handles its data.
    pub(super) is_plain: bool,
    /// Everything its options are kept in, and its network.
    pub(super) options: Vec<u8>,
}

/// The TCP sockets of a process.
#[derive(Debug, Default)]
pub(super) struct Sights {
    /// By their inodes.
    pub(super) sockets: HashMap<u64, Sight>,
    /// Each of its descriptors for them that nobody has ever locked: the inode, and whether
    /// execve(2) closes it.
    pub(super) descriptors: HashMap<i32, (u64, bool)>,
}

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Look {
    layout: Layout,
    program: OwnedFd,
}

impl Look {
    pub(super) fn new() -> io::Result<Self> {
        let layout = Layout::find()?;
        let room = bpf::map(MapKind::Array, HEAD as u32 + layout.len.next_multiple_of(8))?;
        let program = bpf::load_for_tasks(&program(room.as_fd(), &layout), layout.iterator)?;
        Ok(Self { layout, program })
    }

    /// The TCP sockets of the process with this number on the host.
    pub(super) fn at(&self, host: i32) -> io::Result<Sights> {
        let bytes = bpf::read_all(bpf::link_to_task(self.program.as_fd(), host)?.as_fd())?;
        let Sights { mut sockets, mut descriptors } = Sights::default();
        let mut ambiguous = Vec::new();
        for record in bytes.chunks_exact(HEAD + self.layout.len as usize) {
            let Some((head, sight)) = self.sight(record) else { continue };
            if !head.locked {
                descriptors.insert(head.fd, (head.inode, head.closes));
            }
            match sockets.entry(head.inode) {
                Entry::Vacant(place) => {
                    place.insert(sight);
                }
                // The numbers of inodes begin anew some day.
                Entry::Occupied(known) if known.get().socket != sight.socket => {
                    ambiguous.push(head.inode);
                }
                Entry::Occupied(_) => {}
            }
        }
        sockets.retain(|inode, _| !ambiguous.contains(inode));
        Ok(Sights { sockets, descriptors })
    }

    fn sight(&self, record: &[u8]) -> Option<(Head, Sight)> {
        let long = |bytes: &[u8]| Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?));
        let short = |bytes: &[u8]| Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let (head, sock) = record.split_at_checked(HEAD)?;
        let layout = &self.layout;
        // What could not be copied is zero, which is no family.
        let v6 = match i32::from(short(sock.get(layout.family..)?)?) {
            libc::AF_INET => false,
            libc::AF_INET6 => true,
            _ => return None,
        };
        if i32::from(short(sock.get(layout.protocol..)?)?) != libc::IPPROTO_TCP {
            return None;
        }
        let mut options = sock.get(layout.network..layout.network + 8)?.to_vec();
        options.push(v6.into());
        let v6_only = if v6 { &layout.members6[..] } else { &[] };
        for member in layout.members.iter().chain(v6_only) {
            let bytes = sock.get(member.at..member.at + member.len)?;
            options.extend(bytes.iter().map(|byte| byte & member.mask));
        }
        let word = |place: usize| long(&head[8 * place..]);
        let fd = word(2)?;
        let closes = word(3)? >> (fd % 64) & 1 != 0;
        let fd = i32::try_from(fd).ok()?;
        let sight = Sight {
            socket: word(1)?,
            v6,
            state: *sock.get(layout.state)?,
            is_plain: long(sock.get(layout.upper..)?)? == 0,
            options,
        };
        let locked = word(4)? != 0;
        Some((Head { inode: word(0)?, fd, closes, locked }, sight))
    }
}

/// What is told of a descriptor.
struct Head {
    inode: u64,
    fd: i32,
    closes: bool,
    locked: bool,
}

/// The bytes before the structure: the number of the inode, where the structure is, the number of
/// the descriptor, the word with the bit that says whether execve(2) closes it, and where its locks
/// are.
const HEAD: usize = 40;

/// Registers: 6 the text to be written, 7 the file, 8 the room, 9 the context.
fn program(room: BorrowedFd<'_>, layout: &Layout) -> Vec<u64> {
    const KEY: i16 = -8;
    const INODE: i16 = -16;
    const MODE: i16 = -24;
    const SOCKET: i16 = -32;
    const TASK_IN_CONTEXT: i16 = 8;
    const NUMBER_IN_CONTEXT: i16 = 16;
    const FILE_IN_CONTEXT: i16 = 24;
    let mut code = Code::default();
    code.add(COPY, 9, 1, 0, 0);
    code.add(LOAD, 7, 1, FILE_IN_CONTEXT, 0).add(LOAD, 6, 1, 0, 0).add(LOAD, 6, 6, 0, 0);
    // At the end of all.
    let no_file = code.jump(IF_EQUAL, 7, 0);
    for at in (SOCKET..=KEY).step_by(8) {
        code.add(STORE, 10, 0, at, 0);
    }
    code.map(1, room).stack(2, KEY).call(helper::LOOK_UP);
    let no_room = code.jump(IF_EQUAL, 0, 0);
    code.add(COPY, 8, 0, 0, 0);
    let read = |code: &mut Code, from: u32, to: i16, len: i32| {
        code.add(ADD, 3, 0, 0, from.cast_signed()).stack(1, to).add(SET, 2, 0, 0, len);
        code.call(helper::READ_KERNEL);
    };
    // Whether it is a socket.
    code.add(COPY, 3, 7, 0, 0);
    read(&mut code, layout.file_inode, INODE, 8);
    code.add(LOAD, 3, 10, INODE, 0);
    read(&mut code, layout.inode_mode, MODE, 2);
    code.add(LOAD, 1, 10, MODE, 0).add(AND, 1, 0, 0, libc::S_IFMT.cast_signed());
    let no_socket = code.jump(UNLESS_EQUAL, 1, libc::S_IFSOCK.cast_signed());
    // Its locks, which one, and all of it.
    code.add(LOAD, 3, 10, INODE, 0);
    read(&mut code, layout.inode_locks, MODE, 8);
    code.add(LOAD, 1, 10, MODE, 0).add(STORE_REGISTER, 8, 1, 32, 0);
    code.add(LOAD, 3, 10, INODE, 0);
    read(&mut code, layout.inode_number, INODE, 8);
    code.add(LOAD, 1, 10, INODE, 0).add(STORE_REGISTER, 8, 1, 0, 0);
    // The bit of its descriptor: each word has 64.
    code.add(LOAD, 3, 9, TASK_IN_CONTEXT, 0);
    let no_task = code.jump(IF_EQUAL, 3, 0);
    for member in [layout.task_files, layout.files_table, layout.table_closing] {
        read(&mut code, member, INODE, 8);
        code.add(LOAD, 3, 10, INODE, 0);
    }
    code.add(LOAD_WORD, 4, 9, NUMBER_IN_CONTEXT, 0).add(STORE_REGISTER, 8, 4, 16, 0);
    code.add(SHIFT_RIGHT, 4, 0, 0, 6).add(SHIFT_LEFT, 4, 0, 0, 3).add(ADD_REGISTER, 3, 4, 0, 0);
    read(&mut code, 0, INODE, 8);
    code.add(LOAD, 1, 10, INODE, 0).add(STORE_REGISTER, 8, 1, 24, 0);
    code.add(COPY, 3, 7, 0, 0);
    read(&mut code, layout.file_private, SOCKET, 8);
    code.add(LOAD, 3, 10, SOCKET, 0);
    read(&mut code, layout.socket_sock, SOCKET, 8);
    code.add(LOAD, 3, 10, SOCKET, 0).add(STORE_REGISTER, 8, 3, 8, 0);
    code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, HEAD as i32);
    code.add(SET, 2, 0, 0, layout.len.cast_signed()).call(helper::READ_KERNEL);
    code.add(COPY, 1, 6, 0, 0).add(COPY, 2, 8, 0, 0);
    code.add(SET, 3, 0, 0, HEAD as i32 + layout.len.cast_signed()).call(helper::WRITE);
    code.land(no_file).land(no_room).land(no_socket).land(no_task);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}
