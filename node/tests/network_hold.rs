//! Frames for a VE are held and delivered, not lost: seen from a client that counts.
//!
//! Needs root. Every test builds its hosts in network namespaces of its own, which go away with
//! it.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its hosts has failed")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{Cidr, Mac};
use nix::sys::socket::{setsockopt, sockopt};
use node::network::{
    Announcer, Bridge, BridgeConfig, Gate, Hold, Interface, InterfaceConfig, Netlink, link::VethEnd,
};

const CLIENT: &str = "10.99.0.1/16";
const VE: &str = "10.99.1.1/16";
/// How long the connection is cut, one time after the other.
const CUTS_MS: [u64; 6] = [50, 100, 150, 50, 100, 150];

/// A network namespace with a bridge, as a node has it.
struct Host {
    netns: Netns,
    bridge: Bridge,
}

impl Host {
    fn new() -> Self {
        let netns = Netns::create().expect("needs root");
        let bridge = netns.run(|| Bridge::ensure(&BridgeConfig::default())).unwrap().unwrap();
        Self { netns, bridge }
    }

    /// Connects another namespace with the bridge; its end gets the address, when there is one.
    fn connect(&self, other: &Netns, name: &str, address: Option<&str>) {
        self.netns
            .run(|| {
                let mut netlink = Netlink::open().unwrap();
                let near = VethEnd { name, mac: None, netns: None };
                let far = VethEnd { name: "eth0", mac: None, netns: Some(other) };
                netlink.add_veth(&near, &far).unwrap();
                let index = netlink.index(name).unwrap();
                netlink.enslave(index, self.bridge.index).unwrap();
                netlink.set_up(index).unwrap();
            })
            .unwrap();
        let mut netlink = Netlink::open_in(other).unwrap();
        let index = netlink.index("eth0").unwrap();
        if let Some(address) = address {
            netlink.add_address(index, address.parse().unwrap()).unwrap();
        }
        netlink.set_up(index).unwrap();
    }

    /// A host whose bridge is connected with this one's.
    fn with_node(&self, name: &str) -> Self {
        let host = Self::new();
        self.connect(&host.netns, name, None);
        let mut netlink = Netlink::open_in(&host.netns).unwrap();
        let uplink = netlink.index("eth0").unwrap();
        netlink.enslave(uplink, host.bridge.index).unwrap();
        host
    }

    fn attach(&self, ve: &Netns, gate: Gate, mac: Mac) -> Interface {
        let config = interface_config(mac);
        self.netns
            .run(|| match gate {
                Gate::Open => Interface::attach(ve, &self.bridge, &config),
                Gate::Closed => Interface::create(ve, &self.bridge, &config, gate),
            })
            .unwrap()
            .unwrap()
    }

    fn hold(&self, interface: &Interface) -> Hold {
        self.netns.run(|| Hold::prepare(interface, "vh101")).unwrap().unwrap()
    }
}

fn interface_config(mac: Mac) -> InterfaceConfig {
    InterfaceConfig {
        host_name: "veth101.0".into(),
        name: "eth0".into(),
        mac,
        addresses: vec![VE.parse().unwrap()],
        gateways: vec![],
    }
}

fn ip(cidr: &str) -> std::net::IpAddr {
    cidr.parse::<Cidr>().unwrap().address()
}

/// A counter of the TCP stack of a namespace, from `/proc/net/snmp` or `netstat`.
fn counter(netns: &Netns, group: &str, name: &str) -> u64 {
    let text = netns
        .run(|| {
            let read = |file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}"));
            read("snmp").unwrap() + &read("netstat").unwrap()
        })
        .unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(&format!("{group}:")));
    let names = lines.next().expect("the group is there");
    let values = lines.next().expect("values follow names");
    let position = names.split_whitespace().position(|found| found == name).expect("is there");
    values.split_whitespace().nth(position).unwrap().parse().unwrap()
}

fn pattern(position: u64) -> u8 {
    (position.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// Sends the pattern until told to stop; returns how many bytes.
fn send_pattern(mut stream: TcpStream, stop: &AtomicBool) -> u64 {
    let mut position = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let block: Vec<u8> = (0..16_384).map(|i| pattern(position + i)).collect();
        stream.write_all(&block).unwrap();
        position += block.len() as u64;
        // A pace of about 20 MB/s: a loop without it fills both CPUs, and frames then overtake
        // each other with or without a cut.
        thread::sleep(Duration::from_micros(500));
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    position
}

/// Checks the pattern to the end; returns how many bytes, and the longest time without any.
fn check_pattern(mut stream: &TcpStream) -> (u64, Duration) {
    let (mut position, mut longest) = (0u64, Duration::ZERO);
    let mut block = vec![0; 65_536];
    loop {
        let start = Instant::now();
        let length = stream.read(&mut block).unwrap();
        longest = longest.max(start.elapsed());
        if length == 0 {
            return (position, longest);
        }
        for byte in &block[..length] {
            assert_eq!(*byte, pattern(position), "wrong byte at {position}");
            position += 1;
        }
    }
}

fn established(client: &Netns, ve: &Netns) -> (TcpStream, TcpStream) {
    let address = SocketAddr::new(ip(VE), 7);
    let listener = ve.run(|| TcpListener::bind(address)).unwrap().unwrap();
    let outside = client.run(|| TcpStream::connect(address)).unwrap().unwrap();
    let (inside, _) = listener.accept().unwrap();
    (outside, inside)
}

#[test]
fn a_cut_of_a_busy_connection_loses_no_packet() {
    let host = Host::new();
    let client = Netns::create().unwrap();
    let ve = Netns::create().unwrap();
    host.connect(&client, "client", Some(CLIENT));
    let interface = host.attach(&ve, Gate::Open, Mac::local([1; 6]));
    let (outside, inside) = established(&client, &ve);

    let stop = Arc::new(AtomicBool::new(false));
    // The VE only receives, as it would frozen: what it sends into a cut is lost by design,
    // because a frozen VE sends nothing.
    let sender = {
        let stop = stop.clone();
        thread::spawn(move || send_pattern(outside, &stop))
    };
    let receiver = thread::spawn(move || check_pattern(&inside));

    let mut hold = host.hold(&interface);
    let (mut cut_us, mut release_us, mut held, mut timely) = (Vec::new(), Vec::new(), 0, 0);
    let timeouts = || counter(&client, "TcpExt", "TCPTimeouts");
    // One for each frame, however many segments it holds.
    let packets = || {
        [(&client, "OutRequests"), (&ve, "InReceives")]
            .map(|(netns, name)| counter(netns, "Ip", name))
    };
    for milliseconds in CUTS_MS {
        let timeouts_before = timeouts();
        let start = Instant::now();
        hold.cut().unwrap();
        cut_us.push(start.elapsed().as_micros());
        // The blackout itself is what is being tested here.
        thread::sleep(Duration::from_millis(milliseconds));
        let start = Instant::now();
        held += hold.reopen(&[]).unwrap();
        release_us.push(start.elapsed().as_micros());
        thread::sleep(Duration::from_millis(50));
        timely += usize::from(timeouts() == timeouts_before);
    }
    stop.store(true, Ordering::Relaxed);
    let sent = sender.join().unwrap();
    let (received, longest) = receiver.join().unwrap();
    println!(
        "cut {cut_us:?} us, reopen {release_us:?} us, {held} frames held, {} MiB, longest stall \
         {longest:?}, {} timeouts",
        sent >> 20,
        timeouts(),
    );
    assert_eq!(sent, received);
    assert!(held > 0, "the test must have held something");
    // TCP waits 200 ms at least (TCP_RTO_MIN in include/net/tcp.h) before it sends again: longer
    // than any cut, but a machine that stands still by itself makes a cut longer now and then.
    assert!(timely > CUTS_MS.len() / 2, "a timeout in all cuts but {timely}");
    assert_eq!(hold.drain().unwrap().lost, 0);
    let end = Instant::now() + Duration::from_secs(2);
    while packets()[0] != packets()[1] {
        assert!(Instant::now() < end, "sent and received: {:?}", packets());
        thread::sleep(Duration::from_millis(5));
    }
    hold.remove().unwrap();
}

#[test]
fn nothing_passes_while_it_is_cut() {
    let host = Host::new();
    let client = Netns::create().unwrap();
    let ve = Netns::create().unwrap();
    host.connect(&client, "client", Some(CLIENT));
    let interface = host.attach(&ve, Gate::Open, Mac::local([2; 6]));
    let outside = client.run(|| UdpSocket::bind((ip(CLIENT), 9))).unwrap().unwrap();
    let inside = ve.run(|| UdpSocket::bind((ip(VE), 9))).unwrap().unwrap();
    outside.connect((ip(VE), 9)).unwrap();
    inside.connect((ip(CLIENT), 9)).unwrap();
    outside.send(b"before").unwrap();
    let mut buffer = [0; 64];
    assert_eq!(inside.recv(&mut buffer).unwrap(), 6);

    let mut hold = host.hold(&interface);
    hold.cut().unwrap();
    outside.send(b"held").unwrap();
    inside.send(b"lost").unwrap();
    inside.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    outside.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(inside.recv(&mut buffer).is_err(), "a held frame reached the VE");
    assert!(outside.recv(&mut buffer).is_err(), "a frame of the VE got out");

    hold.open_outgoing().unwrap();
    inside.send(b"heard").unwrap();
    assert_eq!(outside.recv(&mut buffer).unwrap(), 5);
    outside.send(b"held2").unwrap();
    assert!(inside.recv(&mut buffer).is_err(), "still held");
    // Perhaps with some of the group frames that a young interface sends.
    assert!(hold.release().unwrap() >= 2);
    for expected in [&b"held"[..], b"held2"] {
        let length = inside.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], expected);
    }
    hold.remove().unwrap();
}

#[test]
fn a_gate_opens_again_after_its_hold_died() {
    let host = Host::new();
    let client = Netns::create().unwrap();
    let ve = Netns::create().unwrap();
    host.connect(&client, "client", Some(CLIENT));
    let interface = host.attach(&ve, Gate::Open, Mac::local([3; 6]));
    let mut hold = host.hold(&interface);
    hold.cut().unwrap();
    drop(hold);
    host.netns
        .run(|| {
            let found = Interface::find(&host.bridge, "veth101.0", interface.mac).unwrap();
            assert_eq!(found, interface);
            found.set_gate(&mut Netlink::open().unwrap(), Gate::Open).unwrap();
        })
        .unwrap();
    let (mut outside, mut inside) = established(&client, &ve);
    outside.write_all(b"x").unwrap();
    let mut byte = [0];
    inside.read_exact(&mut byte).unwrap();
}

/// Two nodes on one LAN; the VE, with its address and its hardware address, is first on one and
/// then on the other. Datagrams carry numbers: none may be missing or out of order.
#[test]
fn a_move_between_hosts_keeps_every_datagram_in_order() {
    let lan = Host::new();
    let source = lan.with_node("source");
    let target = lan.with_node("target");
    let client = Netns::create().unwrap();
    lan.connect(&client, "client", Some(CLIENT));
    let mac = Mac::local([4; 6]);
    let (old, new) = (Netns::create().unwrap(), Netns::create().unwrap());
    let source_interface = source.attach(&old, Gate::Open, mac);

    let outside = client.run(|| UdpSocket::bind((ip(CLIENT), 9))).unwrap().unwrap();
    let at_source = old.run(|| UdpSocket::bind((ip(VE), 9))).unwrap().unwrap();
    outside.connect((ip(VE), 9)).unwrap();
    // A reader that has to wait for a processor loses nothing.
    setsockopt(&at_source, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    // While the kernel asks who has the address it keeps a few datagrams only.
    at_source.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    outside.send(&[0; 8]).unwrap();
    receive(&at_source).expect("an answer to who has the address");
    let stop = Arc::new(AtomicBool::new(false));
    let sender = {
        let stop = stop.clone();
        thread::spawn(move || send_numbers(&outside, &stop))
    };
    let mut next = 0;
    receive_until(&at_source, &mut next, 500);

    // Pre-copy: everything at the target is ready, behind a closed gate.
    let target_interface = target.attach(&new, Gate::Closed, mac);
    let mut at_target_hold = target.hold(&target_interface);
    at_target_hold.cut().unwrap();
    let mut inside = Netlink::open_in(&new).unwrap();
    let eth0 = inside.index("eth0").unwrap();
    inside.set_up(eth0).unwrap();
    inside.add_address(eth0, VE.parse().unwrap()).unwrap();
    let at_target = new.run(|| UdpSocket::bind((ip(VE), 9))).unwrap().unwrap();
    // All that was held arrives at once.
    setsockopt(&at_target, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    let announcer = Announcer::prepare(&new, "eth0", mac, &[ip(VE)]).unwrap();
    let mut at_source_hold = source.hold(&source_interface);
    receive_until(&at_source, &mut next, 1000);

    // Blackout.
    at_source_hold.cut().unwrap();
    at_source.set_nonblocking(true).unwrap();
    while let Some(number) = receive(&at_source) {
        assert_eq!(number, next);
        next += 1;
    }
    thread::sleep(Duration::from_millis(60));
    let early = at_source_hold.drain().unwrap();
    // Switch: the target may speak, says where the VE is now, and gets what was held.
    at_target_hold.open_outgoing().unwrap();
    assert_eq!(announcer.send(), 2);
    let late = at_source_hold.drain().unwrap();
    let replayed = at_target_hold.replay(&early.frames) + at_target_hold.replay(&late.frames);
    let released = at_target_hold.release().unwrap();
    println!("{replayed} frames replayed from the source, {released} held at the target");
    assert!(replayed > 100, "the blackout must have held some");

    at_target.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let goal = next + 2000;
    receive_until(&at_target, &mut next, goal);
    stop.store(true, Ordering::Relaxed);
    let sent = sender.join().unwrap();
    receive_until(&at_target, &mut next, sent);
    let stray = at_source_hold.drain().unwrap().frames;
    assert!(stray.iter().all(|frame| frame.is_group()), "frames still go to the source");
    at_source_hold.remove().unwrap();
    source.netns.run(|| source_interface.detach()).unwrap().unwrap();
    assert!(Netlink::open_in(&source.netns).unwrap().index_of("veth101.0").unwrap().is_none());
    assert!(Netlink::open_in(&source.netns).unwrap().index_of("vh101").unwrap().is_none());
}

/// Sends numbered datagrams at a steady pace; returns how many.
fn send_numbers(socket: &UdpSocket, stop: &AtomicBool) -> u64 {
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        socket.send(&number.to_be_bytes()).unwrap();
        number += 1;
        thread::sleep(Duration::from_micros(100));
    }
    number
}

fn receive(socket: &UdpSocket) -> Option<u64> {
    let mut bytes = [0; 8];
    socket.recv(&mut bytes).ok().map(|_| u64::from_be_bytes(bytes))
}

fn receive_until(socket: &UdpSocket, next: &mut u64, end: u64) {
    while *next < end {
        let number = receive(socket).unwrap_or_else(|| panic!("nothing came after {next}"));
        assert_eq!(number, *next, "lost or out of order");
        *next += 1;
    }
}
