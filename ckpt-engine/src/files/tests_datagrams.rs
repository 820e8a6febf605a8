//! Sockets of the rarer kinds: groups, raw and packet sockets, pings, UDP-Lite, MPTCP.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::Kind;

use super::{
    address, options,
    testing::{Child, Copy, new_network, rebuild},
};
use crate::sys::socket::{self, Along, End};

fn moved(fds: &[&OwnedFd]) -> Copy {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
    let child = Child::holding(&fds);
    assert_eq!(super::check(&child.source()), []);
    let mut captured = child.capture();
    std::mem::take(&mut captured.undo).seal();
    drop(child);
    new_network();
    rebuild(&captured)
}

fn make(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    socket::socket(domain, kind, protocol).unwrap()
}

#[test]
fn groups_are_joined_again() {
    new_network();
    let member = UdpSocket::bind("0.0.0.0:5353").unwrap();
    member.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::LOCALHOST).unwrap();
    let six = UdpSocket::bind("[::]:5354").unwrap();
    six.join_multicast_v6(&"ff02::fb".parse().unwrap(), 1).unwrap();
    let (member, six) = (OwnedFd::from(member), OwnedFd::from(six));
    let numbers = [member.as_raw_fd(), six.as_raw_fd()];
    let copy = moved(&[&member, &six]);
    let member = UdpSocket::from(copy.of(numbers[0]));
    member.leave_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::LOCALHOST).unwrap();
    let six = UdpSocket::from(copy.of(numbers[1]));
    six.leave_multicast_v6(&"ff02::fb".parse().unwrap(), 1).unwrap();
}

#[test]
fn raw_sockets_keep_their_filter_and_header_option() {
    new_network();
    let icmp = make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP);
    options::set(icmp.as_fd(), 255, 1, !(1 << 0)).unwrap();
    let own = make(libc::AF_INET, libc::SOCK_RAW, 253);
    options::set(own.as_fd(), libc::IPPROTO_IP, libc::IP_HDRINCL, 1).unwrap();
    let six = make(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6);
    let numbers = [icmp.as_raw_fd(), own.as_raw_fd(), six.as_raw_fd()];
    let copy = moved(&[&icmp, &own, &six]);
    let number = |at: usize, level, name| {
        options::number(copy.of(numbers[at]).as_fd(), level, name).unwrap()
    };
    assert_eq!(number(0, 255, 1), !(1 << 0));
    assert_eq!(number(1, libc::IPPROTO_IP, libc::IP_HDRINCL), 1);
    assert_eq!(number(2, libc::SOL_SOCKET, libc::SO_PROTOCOL), libc::IPPROTO_ICMPV6);
}

#[test]
fn udp_lite_keeps_its_queue() {
    new_network();
    let server = make(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
    let name = address::encode_inet(&"127.0.0.1:5300".parse::<SocketAddr>().unwrap());
    socket::bind(server.as_fd(), &name).unwrap();
    let client = make(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
    socket::connect(client.as_fd(), &name).unwrap();
    for data in [&b"one"[..], b"two"] {
        socket::send(client.as_fd(), data, &Along::default(), 0).unwrap();
    }
    let number = server.as_raw_fd();
    let copy = moved(&[&server]);
    let server = copy.of(number);
    let mut buffer = [0; 10];
    for data in [&b"one"[..], b"two"] {
        let got = socket::receive(server.as_fd(), &mut buffer, libc::MSG_DONTWAIT).unwrap();
        assert_eq!(&buffer[..got.length], data);
    }
}

#[test]
fn packet_sockets_keep_what_they_listen_to() {
    new_network();
    let sniffer = make(libc::AF_PACKET, libc::SOCK_DGRAM, 0);
    let mut name = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    name.extend(0x0806u16.to_be_bytes());
    name.extend(1u32.to_ne_bytes());
    name.extend([0; 12]);
    socket::bind(sniffer.as_fd(), &name).unwrap();
    // PACKET_MR_PROMISC on the loopback device.
    let mut request = 1u32.to_ne_bytes().to_vec();
    request.extend([1, 0, 0, 0]);
    request.extend([0; 8]);
    let level = libc::SOL_PACKET;
    socket::set_option(sniffer.as_fd(), level, libc::PACKET_ADD_MEMBERSHIP, &request).unwrap();
    options::set(sniffer.as_fd(), level, libc::PACKET_AUXDATA, 1).unwrap();
    let number = sniffer.as_raw_fd();
    let copy = moved(&[&sniffer]);
    let sniffer = copy.of(number);
    assert_eq!(socket::address(sniffer.as_fd(), End::Local).unwrap()[..8], name[..8]);
    assert_eq!(options::number(sniffer.as_fd(), level, libc::PACKET_AUXDATA).unwrap(), 1);
    socket::set_option(sniffer.as_fd(), level, libc::PACKET_DROP_MEMBERSHIP, &request).unwrap();
}

#[test]
fn listeners_for_mptcp_listen_on() {
    new_network();
    let listener = make(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
    let name = address::encode_inet(&"127.0.0.1:5300".parse::<SocketAddr>().unwrap());
    options::set(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
    socket::bind(listener.as_fd(), &name).unwrap();
    socket::listen(listener.as_fd(), 8).unwrap();
    let number = listener.as_raw_fd();
    let copy = moved(&[&listener]);
    let listener = copy.of(number);
    let protocol = options::number(listener.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
    assert_eq!(protocol.unwrap(), libc::IPPROTO_MPTCP);
    let client = make(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP);
    socket::connect(client.as_fd(), &name).unwrap();
    socket::accept(listener.as_fd()).unwrap();
}

#[test]
fn a_question_to_the_kernel_is_answered_after_a_move() {
    new_network();
    let asking = make(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let kernel = [libc::AF_NETLINK as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    socket::bind(asking.as_fd(), &kernel).unwrap();
    // RTM_GETLINK, all.
    let mut question = 32u32.to_ne_bytes().to_vec();
    question.extend([18, 0, 1, 3]);
    question.extend(4711u32.to_ne_bytes());
    question.extend([0; 20]);
    let along = Along { receiver: &kernel, ..Along::default() };
    socket::send(asking.as_fd(), &question, &along, 0).unwrap();
    let number = asking.as_raw_fd();
    let copy = moved(&[&asking]);
    let mut buffer = vec![0; 1 << 16];
    let asking = copy.of(number);
    let got = socket::receive(asking.as_fd(), &mut buffer, libc::MSG_DONTWAIT).unwrap();
    assert!(got.length > 100);
    assert_eq!(buffer[4..12], [16, 0, 2, 0, 0x67, 0x12, 0, 0], "RTM_NEWLINK, the same number");
    assert_eq!(got.sender[4..8], [0; 4], "from the kernel");
}

#[test]
fn an_answer_comes_with_its_acknowledgement() {
    new_network();
    let kernel = [libc::AF_NETLINK as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // RTM_GETLINK of the loopback device; with NLM_F_ACK, and without.
    for (flags, answers) in [([5, 0], 2), ([1, 0], 1)] {
        let asking = make(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        socket::bind(asking.as_fd(), &kernel).unwrap();
        let mut question = 32u32.to_ne_bytes().to_vec();
        question.extend([18, 0]);
        question.extend(flags);
        question.extend([0; 12]);
        question.extend(1u32.to_ne_bytes());
        question.extend([0; 8]);
        let along = Along { receiver: &kernel, ..Along::default() };
        socket::send(asking.as_fd(), &question, &along, 0).unwrap();
        let number = asking.as_raw_fd();
        let copy = moved(&[&asking]);
        let asking = copy.of(number);
        let mut kinds = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while socket::receive(asking.as_fd(), &mut buffer, libc::MSG_DONTWAIT).is_ok() {
            kinds.push(buffer[4]);
        }
        assert_eq!(kinds, [16, 2][..answers], "RTM_NEWLINK, NLMSG_ERROR");
    }
}

/// A datagram that is written in parts: it is the same on the target, and not sent before its end.
fn is_written_on(receiver: &str, protocol: i32, connects: bool, parts: &[usize]) {
    new_network();
    let name: SocketAddr = receiver.parse().unwrap();
    let domain = if name.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let receiver = make(domain, libc::SOCK_DGRAM, protocol);
    socket::bind(receiver.as_fd(), &address::encode_inet(&name)).unwrap();
    let name = socket::address(receiver.as_fd(), End::Local).unwrap();
    let receiver = UdpSocket::from(receiver);
    let sender = make(domain, libc::SOCK_DGRAM, protocol);
    let mut along = Along { receiver: &name, ..Along::default() };
    if connects {
        socket::connect(sender.as_fd(), &name).unwrap();
        along = Along::default();
    }
    let text: Vec<u8> = (0..parts.iter().sum()).map(|at: usize| (at * 31 % 251) as u8).collect();
    let mut at = 0;
    for part in parts {
        socket::send(sender.as_fd(), &text[at..at + part], &along, libc::MSG_MORE).unwrap();
        at += part;
    }
    let number = sender.as_raw_fd();
    let child = Child::holding(&[sender.as_fd()]);
    drop(sender);
    let mut captured = child.capture();
    let Kind::Udp(udp) = &captured.files.files[0].kind else { panic!("not a socket of UDP") };
    assert!(udp.corked.as_ref().unwrap().data == text);
    std::mem::take(&mut captured.undo).seal();
    drop(child);
    let copy = rebuild(&captured).of(number);
    receiver.set_nonblocking(true).unwrap();
    let mut received = vec![0; 1 << 16];
    let early = receiver.recv(&mut received).map_err(|error| error.kind());
    assert_eq!(early, Err(std::io::ErrorKind::WouldBlock), "not before its end");
    socket::send(copy.as_fd(), b"the end", &Along::default(), 0).unwrap();
    let length = receiver.recv(&mut received).unwrap();
    assert!(received[..length] == [&text[..], b"the end"].concat());
}

#[test]
fn a_datagram_that_is_begun_is_written_on() {
    is_written_on("127.0.0.1:0", 0, false, &[6]);
    is_written_on("127.0.0.1:0", 0, true, &[6, 3000, 1, 20_000]);
    is_written_on("[::1]:0", 0, true, &[100, 30_000, 7]);
    is_written_on("[::1]:0", libc::IPPROTO_UDPLITE, false, &[1, 1]);
    is_written_on("127.0.0.1:0", libc::IPPROTO_UDPLITE, false, &[0, 60_000]);
}

#[test]
fn an_ipv6_socket_writes_on_to_an_ipv4_address() {
    is_written_on("[::ffff:127.0.0.1]:0", 0, false, &[10, 20]);
}

#[test]
fn a_datagram_that_is_begun_with_options_is_waited_for() {
    new_network();
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    // Four that do nothing.
    socket::set_option(sender.as_fd(), libc::IPPROTO_IP, libc::IP_OPTIONS, &[1; 4]).unwrap();
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    socket::send(sender.as_fd(), b"first ", &Along::default(), libc::MSG_MORE).unwrap();
    let child = Child::holding(&[sender.as_fd()]);
    let refused = super::capture(&child.source()).unwrap_err();
    assert!(refused[0].object.contains("in several parts"), "{refused:?}");
    socket::send(sender.as_fd(), b"second", &Along::default(), 0).unwrap();
    super::capture(&child.source()).unwrap();
}

#[test]
fn objects_that_cannot_be_moved_are_named() {
    new_network();
    let mptcp = make(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
    let listener = std::net::TcpListener::bind("127.0.0.1:5300").unwrap();
    let name = address::encode_inet(&listener.local_addr().unwrap());
    socket::connect(mptcp.as_fd(), &name).unwrap();
    let crypto = make(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
    let child = Child::holding(&[mptcp.as_fd(), crypto.as_fd()]);
    let names: Vec<String> = child.blockers().into_iter().map(|blocker| blocker.object).collect();
    assert_eq!(names, ["an MPTCP connection", "a socket to the hypervisor (vsock)"]);
}
