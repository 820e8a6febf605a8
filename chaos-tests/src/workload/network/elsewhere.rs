//! Networks with a name, and what is in them.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::time::Duration;

use ckpt_engine::sys::socket;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::wire::{
    ADDRESS, Attributes, GROUP, INFO, MTU, NAMES, NOTE, Named, QUEUE, Wire, host, ip,
};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, Stop, proc_text};

const PAUSE: Duration = Duration::from_millis(5);
const KEPT: [u16; 7] = [ADDRESS, MTU, QUEUE, INFO, NOTE, GROUP, NAMES];

/// Answers everybody with what they say, until it is told to stop.
pub(super) fn answer(listener: &TcpListener, stop: &Stop) -> Result<(), Failure> {
    listener.set_nonblocking(true)?;
    let mut clients: Vec<TcpStream> = Vec::new();
    while !stop.wait(Duration::from_millis(1))? {
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true)?;
                client.set_nodelay(true)?;
                clients.push(client);
            }
            Err(error) => same("no client", error.kind(), ErrorKind::WouldBlock)?,
        }
        let mut gone = Vec::new();
        for (at, client) in clients.iter_mut().enumerate() {
            let mut bytes = [0; 64];
            match client.read(&mut bytes) {
                Ok(0) => gone.push(at),
                Ok(count) => client.write_all(&bytes[..count])?,
                Err(error) => same("nothing to read", error.kind(), ErrorKind::WouldBlock)?,
            }
        }
        for at in gone.into_iter().rev() {
            clients.remove(at);
        }
    }
    Ok(())
}

/// Connects as soon as somebody listens.
pub(super) fn connect(to: SocketAddr) -> Result<TcpStream, Failure> {
    let patience = Duration::from_secs(2);
    for _ in 0..500 {
        if let Ok(stream) = TcpStream::connect_timeout(&to, patience) {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(4));
    }
    Err(Failure::new(format!("nobody listens at {to}")))
}

pub(super) fn talk(stream: &mut TcpStream, number: u32) -> Result<(), Failure> {
    stream.write_all(&number.to_le_bytes())?;
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    same("answer from the other network", u32::from_le_bytes(bytes), number)
}

/// A pair of links, one end of it in a network with a name, and a server there.
pub(super) fn pair(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let network = Named::new(context, "netns-pair", "blue")?;
    let wire = Wire::open()?;
    wire.pair("pair-near", "pair-far", &network)?;
    let names = Attributes::default().text(53, "pair-with-a-very-long-second-name");
    wire.change("pair-near", Attributes::default().number(MTU, 1400).number(QUEUE, 77))?;
    wire.change("pair-near", Attributes::default().number(GROUP, 9).with(NOTE, b"a note"))?;
    let index = wire.index("pair-near")?;
    let mut body = vec![0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body.extend(Attributes::default().nested(NAMES, names).0);
    wire.ask(108, 0xc00, &body)?;
    wire.address("pair-near", ip(1, 1))?;
    wire.up("pair-near")?;
    let server = Child::start(context, "server", |stop| {
        let wire = network.enter()?;
        wire.address("pair-far", ip(1, 2))?;
        wire.up("pair-far")?;
        let far = wire.describe("pair-far", &KEPT)?;
        let listener = TcpListener::bind((host(1, 2), 7001))?;
        answer(&listener, stop)?;
        same("the other end", wire.describe("pair-far", &KEPT)?, far)
    })?;
    let mut kept = connect((host(1, 2), 7001).into())?;
    let before = wire.describe("pair-near", &KEPT)?;
    let mut number = 0;
    while context.step(PAUSE)? {
        number += 1;
        server.check()?;
        talk(&mut kept, number)?;
        if number % 50 == 0 {
            talk(&mut connect((host(1, 2), 7001).into())?, number)?;
        }
        same("the link", wire.describe("pair-near", &KEPT)?, before.clone())?;
        if context.progress.plant() {
            wire.change("pair-near", Attributes::default().number(MTU, 1300))?;
        }
    }
    server.finish()?;
    wire.remove("pair-near")
}

/// A network that is only held by its name, with a pair of links inside.
pub(super) fn empty(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let network = Named::new(context, "netns-empty", "nobody")?;
    let furnish = Child::start(context, "furnish", |_| {
        let wire = network.enter()?;
        let peer = Attributes::default().text(3, "one-end");
        let data = Attributes::default().with(1, &[vec![0; 16], peer.0].concat());
        wire.make(Attributes::default().text(3, "other-end").info("veth", data))?;
        wire.address("one-end", ip(2, 1))?;
        wire.up("one-end")
    })?;
    furnish.finish()?;
    let mut damage = false;
    let mut last = None;
    while context.step(Duration::from_millis(50))? {
        damage |= context.progress.plant();
        let seen = context.path("seen");
        let look = Child::start(context, "look", |_| {
            let wire = network.enter()?;
            if damage {
                wire.remove("one-end")?;
            }
            let found =
                [wire.describe("one-end", &KEPT)?, wire.describe("other-end", &[ADDRESS, MTU])?];
            TcpListener::bind((host(2, 1), 7002))?;
            Ok(fs::write(&seen, format!("{found:?}"))?)
        })?;
        look.finish()?;
        let seen = fs::read_to_string(&seen)?;
        same("links of the network", last.get_or_insert_with(|| seen.clone()).clone(), seen)?;
    }
    Ok(())
}

/// Sockets of all kinds in another network, with names that there are outside, too.
pub(super) fn sockets(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let name = UnixAddress::from_abstract_name(b"one name in two networks")?;
    let outside = UnixDatagram::bind_addr(&name)?;
    let _listener = TcpListener::bind("127.0.0.1:7003")?;
    let word = context.path("word");
    fs::write(&word, "stay")?;
    let inside = Child::start(context, "inside", |stop| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Wire::open()?.up("lo")?;
        let unix = UnixDatagram::bind_addr(&name)?;
        let sender = UnixDatagram::unbound()?;
        sender.connect_addr(&name)?;
        let listener = TcpListener::bind("127.0.0.1:7003")?;
        let mut kept = TcpStream::connect("127.0.0.1:7003")?;
        let (mut served, _) = listener.accept()?;
        // They wait all the time.
        let early = [(); 2].map(|()| TcpStream::connect("127.0.0.1:7003"));
        let udp = [UdpSocket::bind("127.0.0.1:7003")?, UdpSocket::bind("127.0.0.1:0")?];
        let frames = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
        sender.send(b"waits")?;
        udp[1].send_to(b"waits", "127.0.0.1:7003")?;
        let mut number = 0u32;
        while !stop.wait(PAUSE)? {
            number += 1;
            let mut bytes = [0; 5];
            sender.send(b"waits")?;
            unix.recv(&mut bytes)?;
            same("a unix datagram", &bytes, b"waits")?;
            udp[1].send_to(b"waits", "127.0.0.1:7003")?;
            udp[0].recv(&mut bytes)?;
            same("a datagram", &bytes, b"waits")?;
            kept.write_all(&number.to_le_bytes())?;
            let mut bytes = [0; 4];
            served.read_exact(&mut bytes)?;
            same("a number", u32::from_le_bytes(bytes), number)?;
            socket::address(frames.as_fd(), socket::End::Local)?;
            ensure(early.iter().all(Result::is_ok), || "a client was refused".to_owned())?;
            if fs::read_to_string(&word)? == "damage" {
                sender.send(b"wrong")?;
            }
        }
        for client in early {
            let (mut server, _) = listener.accept()?;
            server.write_all(b"x")?;
            client?.read_exact(&mut [0])?;
        }
        Ok(())
    })?;
    let mut bytes = [0; 5];
    while context.step(PAUSE)? {
        inside.check()?;
        if context.progress.plant() {
            fs::write(&word, "damage")?;
        }
        let sender = UnixDatagram::unbound()?;
        sender.connect_addr(&name)?;
        sender.send(b"mine!")?;
        outside.recv(&mut bytes)?;
        same("a unix datagram outside", &bytes, b"mine!")?;
    }
    inside.finish()
}

/// Routes, policy rules, neighbours and settings of another network.
pub(super) fn settings(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let word = context.path("word");
    fs::write(&word, "stay")?;
    let inside = Child::start(context, "inside", |stop| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let wire = Wire::open()?;
        wire.up("lo")?;
        let peer = Attributes::default().text(3, "way-out");
        let data = Attributes::default().with(1, &[vec![0; 16], peer.0].concat());
        wire.make(Attributes::default().text(3, "way-in").info("veth", data))?;
        for (name, number) in [("way-in", 1), ("way-out", 2)] {
            wire.address(name, ip(30 + number, 1))?;
            wire.up(name)?;
        }
        // 10.201.0.0/16 by 10.200.31.9 in table 77, and a rule that leads there.
        let way =
            Attributes::default().with(1, &[10, 201, 0, 0]).with(5, &ip(31, 9)).number(15, 77);
        wire.ask(24, 0x600, &[vec![2, 16, 0, 0, 77, 4, 0, 1, 0, 0, 0, 0], way.0].concat())?;
        let rule = Attributes::default().number(6, 500).number(10, 5).number(15, 77);
        wire.ask(32, 0x600, &[vec![2, 0, 0, 0, 77, 0, 0, 1, 0, 0, 0, 0], rule.0].concat())?;
        let forwarding = "/proc/sys/net/ipv4/conf/way-in/forwarding";
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        fs::write(forwarding, "0")?;
        let look = || -> Result<String, Failure> {
            let mut text = proc_text("/proc/self/net/route")?;
            for path in ["/proc/sys/net/ipv4/ip_forward", forwarding] {
                text += &proc_text(path)?;
            }
            // Who gets a packet with the mark 5.
            let question = Attributes::default().with(1, &[10, 201, 0, 1]).number(16, 5);
            let body = [vec![2, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], question.0].concat();
            let found = wire.ask(26, 0, &body)?;
            let gateway = found.windows(4).any(|bytes| bytes == ip(31, 9));
            Ok(format!("{text}{gateway}"))
        };
        let before = look()?;
        ensure(before.ends_with("true"), || "the rule does not lead there".to_owned())?;
        while !stop.wait(PAUSE)? {
            if fs::read_to_string(&word)? == "damage" {
                fs::write(forwarding, "1")?;
            }
            same("routes and settings", look()?, before.clone())?;
        }
        Ok(())
    })?;
    while context.step(PAUSE)? {
        inside.check()?;
        if context.progress.plant() {
            fs::write(&word, "damage")?;
        }
    }
    inside.finish()
}

/// What `ip netns exec` does: a mount namespace with a `/sys` of the other network.
pub(super) fn files(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let network = Named::new(context, "netns-files", "seen")?;
    let word = context.path("word");
    fs::write(&word, "stay")?;
    let inside = Child::start(context, "inside", |stop| {
        let wire = network.enter()?;
        let peer = Attributes::default().text(3, "seen-two");
        let data = Attributes::default().with(1, &[vec![0; 16], peer.0].concat());
        wire.make(Attributes::default().text(3, "seen-one").info("veth", data))?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
        mount(Some("seen"), "/sys", Some("sysfs"), MsFlags::MS_RDONLY, none)?;
        while !stop.wait(PAUSE)? {
            if fs::read_to_string(&word)? == "damage" {
                wire.remove("seen-one")?;
            }
            let mut names = Vec::new();
            for entry in fs::read_dir("/sys/class/net")? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            names.retain(|name| name == "lo" || name == "eth0" || name.starts_with("seen"));
            same("links in /sys", names.join(" ").as_str(), "lo seen-one seen-two")?;
        }
        Ok(())
    })?;
    while context.step(PAUSE)? {
        inside.check()?;
        if context.progress.plant() {
            fs::write(&word, "damage")?;
        }
    }
    inside.finish()
}
