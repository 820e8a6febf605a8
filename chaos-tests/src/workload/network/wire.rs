//! Links, made and looked at by netlink as any program does it.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use ckpt_engine::sys::socket::{self, Along};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure};
use crate::workload::process::Child;

pub(super) const ADDRESS: u16 = 1;
pub(super) const NAME: u16 = 3;
pub(super) const MTU: u16 = 4;
pub(super) const PARENT: u16 = 5;
pub(super) const CONTROLLER: u16 = 10;
pub(super) const QUEUE: u16 = 13;
pub(super) const INFO: u16 = 18;
pub(super) const NOTE: u16 = 20;
pub(super) const GROUP: u16 = 27;
pub(super) const NAMESPACE: u16 = 28;
pub(super) const NAMES: u16 = 52;

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const HEADER: usize = 16;
const UP: u32 = 1;
const MAKE: u16 = 0x600;

/// Attributes one behind the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = value.len() + 4;
        self.0.extend((length as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.with(kind, &[value.as_bytes(), b"\0"].concat())
    }

    pub(super) fn nested(self, kind: u16, value: Self) -> Self {
        self.with(kind | 0x8000, &value.0)
    }

    /// What makes a link of a kind.
    pub(super) fn info(self, kind: &str, data: Self) -> Self {
        let info = Self::default().text(1, kind);
        let info = if data.0.is_empty() { info } else { info.nested(2, data) };
        self.nested(INFO, info)
    }
}

fn header(index: u32, flags: u32) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// Talks with the kernel about the network of whoever opened it.
#[derive(Debug)]
pub(super) struct Wire(OwnedFd);

impl Wire {
    pub(super) fn open() -> Result<Self, Failure> {
        Ok(Self(socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?))
    }

    /// The same about the packet filter.
    pub(super) fn open_filter() -> Result<Self, Failure> {
        Ok(Self(socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER)?))
    }

    /// Sends several requests at once, each with its type, flags and body; those with the flag for it
    /// are answered.
    pub(super) fn batch(&self, requests: &[(u16, u16, Vec<u8>)]) -> Result<(), Failure> {
        const ACKNOWLEDGE: u16 = 4;
        let mut bytes = Vec::new();
        for (kind, flags, body) in requests {
            bytes.extend(((16 + body.len()) as u32).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend((flags | 1).to_ne_bytes());
            bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(body);
        }
        socket::send(self.0.as_fd(), &bytes, &Along::default(), 0)?;
        let mut buffer = vec![0; 64 << 10];
        for _ in requests.iter().filter(|(_, flags, _)| flags & ACKNOWLEDGE != 0) {
            let length = socket::receive(self.0.as_fd(), &mut buffer, 0)?.length;
            let code = buffer.get(16..length).and_then(|body| body.first_chunk());
            match code.map(|code| i32::from_ne_bytes(*code)) {
                Some(0) => {}
                code => return Err(Failure::new(format!("request refused: {code:?}"))),
            }
        }
        Ok(())
    }

    /// Asks for a list; returns the body of each answer.
    pub(super) fn list(&self, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
        const DUMP: u16 = 0x300;
        let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((DUMP | 1).to_ne_bytes());
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(body);
        socket::send(self.0.as_fd(), &bytes, &Along::default(), 0)?;
        let (mut answers, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            let length = socket::receive(self.0.as_fd(), &mut buffer, 0)?.length;
            let mut rest = &buffer[..length];
            while rest.len() >= 16 {
                let end = u32::from_ne_bytes([0, 1, 2, 3].map(|at| rest[at])) as usize;
                match u16::from_ne_bytes([rest[4], rest[5]]) {
                    3 => return Ok(answers),
                    2 => return Err(Failure::new("a list is refused")),
                    _ => answers.push(rest[16..end].to_vec()),
                }
                rest = &rest[end.next_multiple_of(4).min(rest.len())..];
            }
        }
    }

    /// Asks for something; returns the first answer.
    pub(super) fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | 1 | 4).to_ne_bytes());
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(body);
        socket::send(self.0.as_fd(), &bytes, &Along::default(), 0)?;
        let (mut first, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            let length = socket::receive(self.0.as_fd(), &mut buffer, 0)?.length;
            let mut rest = &buffer[..length];
            while rest.len() >= 20 {
                let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|by| rest[at + by]));
                let end = word(0) as usize;
                match word(4) as u16 {
                    2 if word(16) == 0 => return Ok(first),
                    2 => {
                        let error = std::io::Error::from_raw_os_error(-word(16).cast_signed());
                        return Err(Failure::new(format!("request {kind}: {error}")));
                    }
                    _ if first.is_empty() => first = rest[16..end].to_vec(),
                    _ => {}
                }
                rest = &rest[end.next_multiple_of(4).min(rest.len())..];
            }
        }
    }

    pub(super) fn make(&self, attributes: Attributes) -> Result<(), Failure> {
        self.ask(NEW_LINK, MAKE, &[header(0, 0), attributes.0].concat()).map(drop)
    }

    pub(super) fn change(&self, name: &str, attributes: Attributes) -> Result<(), Failure> {
        let index = self.index(name)?;
        self.ask(NEW_LINK, 0, &[header(index, 0), attributes.0].concat()).map(drop)
    }

    pub(super) fn up(&self, name: &str) -> Result<(), Failure> {
        self.ask(NEW_LINK, 0, &header(self.index(name)?, UP)).map(drop)
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), Failure> {
        self.ask(17, 0, &header(self.index(name)?, 0)).map(drop)
    }

    fn told(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let body = [header(0, 0), Attributes::default().text(NAME, name).0].concat();
        let told = self.ask(GET_LINK, 0, &body)?;
        ensure(told.len() > HEADER, || format!("nothing is told about {name}"))?;
        Ok(told)
    }

    pub(super) fn index(&self, name: &str) -> Result<u32, Failure> {
        let told = self.told(name)?;
        Ok(u32::from_ne_bytes([4, 5, 6, 7].map(|at| told[at])))
    }

    /// What must stay as it is of a link: its number, whether it is up, and these attributes.
    pub(super) fn describe(&self, name: &str, kinds: &[u16]) -> Result<Described, Failure> {
        let told = self.told(name)?;
        let mut described = vec![(0, told[4..9].to_vec())];
        let mut rest = &told[HEADER..];
        while rest.len() >= 4 {
            let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]])).max(4);
            let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
            if kinds.contains(&kind) {
                described.push((kind, rest[4..length].to_vec()));
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        Ok(described)
    }

    pub(super) fn address(&self, name: &str, address: [u8; 4]) -> Result<(), Failure> {
        let mut body = vec![libc::AF_INET as u8, 24, 0, 0];
        body.extend(self.index(name)?.to_ne_bytes());
        body.extend(Attributes::default().with(2, &address).with(1, &address).0);
        self.ask(NEW_ADDRESS, MAKE, &body).map(drop)
    }

    /// A pair, one end of it in another network.
    pub(super) fn pair(&self, near: &str, far: &str, network: &Named) -> Result<(), Failure> {
        let other = network.open()?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&other);
        let peer = Attributes::default().text(NAME, far).with(NAMESPACE, &number.to_ne_bytes());
        let data = Attributes::default().with(1, &[header(0, 0), peer.0].concat());
        self.make(Attributes::default().text(NAME, near).info("veth", data))
    }
}

/// Number, flags and attributes of a link.
pub(super) type Described = Vec<(u16, Vec<u8>)>;

/// A network with a name, as `ip netns add` makes it: mounted on a file, and nobody in it.
#[derive(Debug)]
pub(super) struct Named {
    path: PathBuf,
}

impl Named {
    pub(super) fn new(context: &Context, directory: &str, name: &str) -> Result<Self, Failure> {
        let directory = Path::new("/run").join(directory);
        if !directory.exists() {
            fs::create_dir_all(&directory)?;
            let (none, bind) = (None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC);
            mount(Some(&directory), &directory, none, bind, none)?;
            let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
            mount(none, &directory, none, shared, none)?;
        }
        let path = directory.join(name);
        File::create(&path)?;
        let maker = Child::start(context, "maker", |_| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Wire::open()?.up("lo")?;
            let none = None::<&str>;
            mount(Some("/proc/self/ns/net"), &path, none, MsFlags::MS_BIND, none)?;
            Ok(())
        })?;
        maker.finish()?;
        Ok(Self { path })
    }

    pub(super) fn open(&self) -> Result<File, Failure> {
        Ok(File::open(&self.path)?)
    }

    /// Goes there, for ever.
    pub(super) fn enter(&self) -> Result<Wire, Failure> {
        setns(self.open()?, CloneFlags::CLONE_NEWNET)?;
        Wire::open()
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // A VE that ends takes it along in any case.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

/// An address of a network that only these workloads use.
pub(super) fn ip(net: u8, host: u8) -> [u8; 4] {
    [10, 200, net, host]
}

/// The same as text.
pub(super) fn host(net: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::from(ip(net, host))
}
