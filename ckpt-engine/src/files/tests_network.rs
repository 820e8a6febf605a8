//! Sockets without a connection, and what has to do with processes: locks, pidfds.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd},
};

use ckpt_format::files::Kind;

use super::testing::{Child, new_network, rebuild, rebuild_in};
use crate::sys::{descriptor, socket, tun};

#[test]
fn udp_keeps_addresses_and_waiting_datagrams() {
    new_network();
    let server = UdpSocket::bind("0.0.0.0:5300").unwrap();
    let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
    connected.connect("127.0.0.1:5300").unwrap();
    let six = UdpSocket::bind("[::]:5400").unwrap();
    // The kernel shows an empty one at the head only to the first who looks.
    for data in [&b""[..], b"one", b"", b"three"] {
        connected.send(data).unwrap();
    }
    UdpSocket::bind("[::1]:5500").unwrap().send_to(b"six", "[::1]:5400").unwrap();
    let from = connected.local_addr().unwrap();
    server.send_to(b"answer", from).unwrap();
    let all = [server.as_fd(), connected.as_fd(), six.as_fd()];
    let numbers = all.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&all);
    drop((server, connected, six));
    let captured = child.capture();
    drop(child);
    new_network();

    let copy = rebuild(&captured);
    let [server, connected, six] = numbers.map(|number| UdpSocket::from(copy.of(number)));
    for socket in [&server, &connected, &six] {
        socket.set_nonblocking(true).unwrap();
    }
    let mut buffer = [0; 100];
    for expected in [&b""[..], b"one", b"", b"three"] {
        let (length, sender) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], sender), (expected, from));
    }
    assert_eq!(connected.recv(&mut buffer).unwrap(), 6);
    let (length, sender) = six.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], sender.to_string()), (&b"six"[..], "[::1]:5500".to_owned()));
    server.send_to(b"again", from).unwrap();
    assert_eq!(connected.recv(&mut buffer).unwrap(), 5);
}

#[test]
fn netlink_sockets_keep_their_groups_and_port() {
    new_network();
    let netlink = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap();
    let mut address = vec![libc::AF_NETLINK as u8, 0, 0, 0];
    address.extend(4711u32.to_ne_bytes());
    // Link changes, and IPv4 addresses.
    address.extend((1u32 | 1 << 4).to_ne_bytes());
    socket::bind(netlink.as_fd(), &address).unwrap();
    let child = Child::holding(&[netlink.as_fd()]);
    let number = netlink.as_raw_fd();
    drop(netlink);
    let captured = child.capture();
    let Kind::Netlink(state) = &captured.files.files[0].kind else { panic!("a netlink socket") };
    assert_eq!((state.port, &state.groups[..], &state.waiting), (4711, &[1, 5][..], &None));
    new_network();
    let copy = rebuild(&captured);
    let copied = socket::address(copy.of(number).as_fd(), socket::End::Local).unwrap();
    assert_eq!(copied[4..8], 4711u32.to_ne_bytes());
    let mut buffer = [0; 4096];
    crate::sys::testing::loopback_down().unwrap();
    let told = socket::receive(copy.of(number).as_fd(), &mut buffer, libc::MSG_DONTWAIT);
    assert!(told.unwrap().length > 16, "the change of the loopback device is told");
}

#[test]
fn a_capture_in_vain_loses_no_empty_datagram() {
    new_network();
    let server = UdpSocket::bind("127.0.0.1:5300").unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect("127.0.0.1:5300").unwrap();
    let sent: [&[u8]; 5] = [b"", b"one", b"", b"", b"two"];
    for datagram in sent {
        client.send(datagram).unwrap();
    }
    let child = Child::holding(&[server.as_fd()]);
    let first = child.capture();
    let second = {
        let files = first.files.clone();
        drop(first);
        let second = child.capture();
        assert_eq!(second.files, files);
        second
    };
    drop(second);
    server.set_nonblocking(true).unwrap();
    let mut bytes = [0; 10];
    for datagram in sent {
        let (count, sender) = server.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..count], sender), (datagram, client.local_addr().unwrap()));
    }
    assert!(server.recv_from(&mut bytes).is_err());
}

#[test]
fn a_timer_that_ends_while_it_is_on_its_way_is_counted_once() {
    use nix::sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    };
    use std::time::{Duration, Instant};
    const BEAT: Duration = Duration::from_millis(3);
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
    let child = Child::holding(&[timer.as_fd()]);
    let number = timer.as_fd().as_raw_fd();
    let beat = Expiration::Interval(TimeSpec::from_duration(BEAT));
    let start = Instant::now();
    timer.set(beat, TimerSetTimeFlags::empty()).unwrap();
    // Captured at every point of its beat, and copies of copies are what moves make.
    for _ in 0..300 {
        let captured = child.capture();
        let due = start.elapsed().as_nanos() / BEAT.as_nanos();
        let copy = rebuild(&captured).of(number);
        let mut ticks = [0; 8];
        let got = nix::unistd::read(&copy, &mut ticks).unwrap_or(0);
        let late = start.elapsed().as_nanos() / BEAT.as_nanos();
        let ticks = if got == 8 { u128::from(u64::from_ne_bytes(ticks)) } else { 0 };
        assert!(ticks <= late, "{ticks} ticks where {late} were due");
        assert!(ticks + 1 >= due, "{ticks} ticks where {due} were due");
    }
}

#[test]
fn locks_stay_with_descriptions_and_processes() {
    use nix::fcntl::{FcntlArg, fcntl};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pid");
    let file = File::options().create(true).write(true).truncate(true).open(&path).unwrap();
    descriptor::lock_description(file.as_fd(), true).unwrap();
    let part = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 100,
        l_len: 10,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&part)).unwrap();
    let child = Child::holding(&[file.as_fd()]);
    let number = file.as_raw_fd();
    let captured = child.capture();
    drop((file, child));
    assert_eq!(captured.files.files[0].locks.len(), 2);

    let copy = rebuild(&captured);
    let other = File::options().read(true).write(true).open(&path).unwrap();
    let refused = descriptor::lock_description(other.as_fd(), false).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    let mut found = libc::flock { l_start: 0, l_len: 0, ..part };
    fcntl(&other, FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
    assert_eq!((found.l_start, found.l_len, found.l_pid), (100, 10, -1));
    drop((copy.of(number), copy));
    descriptor::lock_description(other.as_fd(), false).unwrap();
}

#[test]
fn a_pidfd_leads_to_the_new_process() {
    let other = Child::holding(&[]);
    let pidfd = descriptor::open_process(other.pid, false).unwrap();
    let child = Child::holding(&[pidfd.as_fd()]);
    assert_eq!(child.blockers().len(), 1, "a process outside the VE");
    let number = pidfd.as_raw_fd();
    let mut source = child.source();
    source.processes.push(super::Holder { pid: 9, ..other.holder() });
    let captured = super::capture(&source).unwrap();
    let new = Child::holding(&[]);
    let mut target = super::Target::new(0).unwrap();
    target.processes = HashMap::from([(9, new.pid)]);
    let copy = rebuild_in(&captured, target);
    let info = super::info::Info::of(copy.of(number).as_fd()).unwrap();
    assert_eq!(info.text("Pid").unwrap(), new.pid.to_string());
}

#[test]
fn a_memfd_keeps_its_descriptions() {
    let memfd = crate::sys::task::memfd("state").unwrap();
    let mut file = File::from(memfd.try_clone().unwrap());
    file.write_all(b"contents").unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    let child = Child::holding(&[file.as_fd()]);
    let number = file.as_raw_fd();
    let captured = child.capture();
    drop(child);
    assert_eq!(captured.files.unnamed.len(), 1);
    let mut target = super::Target::new(0).unwrap();
    target.shared.insert(captured.files.unnamed[0].id, memfd);
    let copy = rebuild_in(&captured, target);
    let mut rest = String::new();
    File::from(copy.of(number)).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "tents");
}

#[test]
fn packet_filters_go_along() {
    // Accepts everything: BPF_RET | BPF_K, with the largest length.
    let accept = [6u8, 0, 0, 0, 0xff, 0xff, 0, 0];
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket::attach_filter(socket.as_fd(), &accept).unwrap();
    let child = Child::holding(&[socket.as_fd()]);
    let number = socket.as_raw_fd();
    drop(socket);
    let captured = child.capture();
    drop(child);
    let copy = rebuild(&captured);
    assert_eq!(socket::filter(copy.of(number).as_fd()).unwrap(), accept);
}

#[test]
fn a_file_of_a_tap_is_attached_to_its_link_again() {
    new_network();
    let open = || File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let (file, idle) = (open(), open());
    let flags = tun::TAP | tun::VNET_HEADER;
    tun::attach(file.as_fd(), "tap-moved", flags).unwrap();
    tun::change(file.as_fd(), tun::Change::Persist, 1).unwrap();
    tun::change(file.as_fd(), tun::Change::SendBuffer, 54_321).unwrap();
    let child = Child::holding(&[file.as_fd(), idle.as_fd()]);
    let numbers = (file.as_raw_fd(), idle.as_raw_fd());
    let captured = child.capture();
    drop((child, file, idle));
    let copy = rebuild(&captured);
    let (file, idle) = (copy.of(numbers.0), copy.of(numbers.1));
    let (name, found) = tun::attachment(file.as_fd()).unwrap().unwrap();
    assert_eq!((name.as_str(), found & flags, found & tun::PERSIST), ("tap-moved", flags, 0x800));
    assert_eq!(tun::query(file.as_fd(), tun::Query::SendBuffer).unwrap(), 54_321);
    assert_eq!(tun::attachment(idle.as_fd()).unwrap(), None);
}
