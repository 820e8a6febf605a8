//! Terminals of a file system of their own.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};

use crate::{
    files::testing::{Child, rebuild},
    sys::tty,
};

/// Gives this thread terminals of its own.
fn new_terminals() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
    let options = Some("newinstance,ptmxmode=0666,mode=620,gid=5");
    mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), options).unwrap();
}

fn open_pair() -> (OwnedFd, OwnedFd) {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = nix::fcntl::open("/dev/pts/ptmx", flags, Mode::empty()).unwrap();
    tty::set_locked(master.as_fd(), false).unwrap();
    let slave = tty::slave(master.as_fd(), libc::O_RDWR).unwrap();
    (master, slave)
}

/// A terminal with a line and a half in one direction and some output in the other.
fn busy_pair() -> (OwnedFd, OwnedFd) {
    let (master, slave) = open_pair();
    tty::set_window(master.as_fd(), &[24, 80, 1, 2]).unwrap();
    let mut settings = tty::settings(slave.as_fd()).unwrap();
    // No echo, which would mix with the output.
    settings[12] &= !8;
    tty::set_settings(slave.as_fd(), &settings).unwrap();
    File::from(slave.try_clone().unwrap()).write_all(b"hello\n").unwrap();
    File::from(master.try_clone().unwrap()).write_all(b"line one\npar").unwrap();
    (master, slave)
}

fn check_busy_pair(master: OwnedFd, slave: OwnedFd) {
    assert_eq!(tty::window(slave.as_fd()).unwrap(), [24, 80, 1, 2]);
    assert_eq!(tty::settings(slave.as_fd()).unwrap()[12] & 8, 0);
    let (mut master, mut slave) = (File::from(master), File::from(slave));
    let mut buffer = [0; 100];
    let length = slave.read(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"line one\n");
    master.write_all(b"tial\n").unwrap();
    let length = slave.read(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"partial\n");
    let length = master.read(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"hello\r\n");
}

#[test]
fn a_terminal_keeps_its_number_settings_and_buffers() {
    new_terminals();
    let zero = open_pair();
    let (master, slave) = busy_pair();
    assert_eq!(tty::query(master.as_fd(), tty::Query::Index).unwrap(), 1);
    let child = Child::holding(&[master.as_fd(), slave.as_fd()]);
    let numbers = [master.as_raw_fd(), slave.as_raw_fd()];
    drop((master, slave));
    let mut captured = child.capture();
    std::mem::take(&mut captured.undo).seal();
    drop(child);
    drop(zero);
    let copy = rebuild(&captured);
    let [master, slave] = numbers.map(|number| copy.of(number));
    drop(copy);
    assert_eq!(tty::query(master.as_fd(), tty::Query::Index).unwrap(), 1);
    check_busy_pair(master, slave);
}

#[test]
fn an_aborted_capture_puts_the_buffers_back() {
    new_terminals();
    let (master, slave) = busy_pair();
    let child = Child::holding(&[master.as_fd(), slave.as_fd()]);
    drop(child.capture());
    check_busy_pair(master, slave);
}

#[test]
fn a_terminal_of_the_host_is_a_blocker() {
    new_terminals();
    let (master, slave) = open_pair();
    let child = Child::holding(&[slave.as_fd()]);
    let blockers = child.blockers();
    assert_eq!(blockers.len(), 1);
    assert_eq!(blockers[0].object, "a terminal whose other side is outside the VE");
    drop(master);
    assert_eq!(child.blockers(), [], "a terminal that was hung up has no other side");
    let captured = child.capture();
    let number = slave.as_raw_fd();
    drop((slave, child));
    let copy = rebuild(&captured);
    let mut slave = File::from(copy.of(number));
    drop(copy);
    assert_eq!(slave.read(&mut [0; 4]).unwrap(), 0);
    assert_eq!(slave.write(b"x").unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_master_remembers_that_its_slave_has_gone() {
    new_terminals();
    let (left, slave) = open_pair();
    drop(slave);
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let fresh = nix::fcntl::open("/dev/pts/ptmx", flags, Mode::empty()).unwrap();
    let child = Child::holding(&[left.as_fd(), fresh.as_fd()]);
    let numbers = [left.as_raw_fd(), fresh.as_raw_fd()];
    let captured = child.capture();
    drop((left, fresh, child));
    let copy = rebuild(&captured);
    let [mut left, mut fresh] = numbers.map(|number| File::from(copy.of(number)));
    drop(copy);
    assert_eq!(left.read(&mut [0; 4]).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(fresh.read(&mut [0; 4]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

/// A terminal with all that is easily lost in it: ends of input and literal characters in what was
/// typed, output that is stopped, and news for the reader of packets.
fn subtle_pair() -> (OwnedFd, OwnedFd) {
    let (master, slave) = open_pair();
    let mut settings = tty::settings(slave.as_fd()).unwrap();
    settings[12] &= !8;
    tty::set_settings(slave.as_fd(), &settings).unwrap();
    let (mut keys, mut program) =
        (File::from(master.try_clone().unwrap()), File::from(slave.try_clone().unwrap()));
    program.write_all(b"said\n").unwrap();
    tty::set_packet_mode(master.as_fd(), true).unwrap();
    keys.write_all(b"one\x04\x04two\x16\x04\x16\n\x16\0 \x16\x13end\nhalf").unwrap();
    keys.write_all(b"\x13").unwrap();
    wait_until(|| is_stopped(&program));
    (master, slave)
}

/// Waits for what the kernel does by itself.
fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

fn is_stopped(program: &File) -> bool {
    let mut polled = [nix::poll::PollFd::new(program.as_fd(), nix::poll::PollFlags::POLLOUT)];
    nix::poll::poll(&mut polled, nix::poll::PollTimeout::ZERO).unwrap() == 0
}

fn check_subtle_pair(master: OwnedFd, slave: OwnedFd) {
    let (mut master, mut slave) = (File::from(master), File::from(slave));
    let mut buffer = [0; 100];
    let mut next = |file: &mut File| {
        let length = file.read(&mut buffer).unwrap();
        buffer[..length].to_vec()
    };
    assert!(is_stopped(&slave));
    // That it was stopped, and nothing else; then what was said before.
    assert_eq!(next(&mut master), b"\x04");
    assert_eq!(next(&mut master), b"\0said\r\n");
    for line in [&b"one"[..], b"", b"two\x04\n\0 \x13end\n"] {
        assert_eq!(next(&mut slave), line);
    }
    master.write_all(b"\x11 done\n").unwrap();
    assert_eq!(next(&mut slave), b"half done\n");
    wait_until(|| !is_stopped(&slave));
    assert_eq!(next(&mut master), b"\x08");
}

#[test]
fn what_is_easily_lost_stays_in_vain_and_moves() {
    new_terminals();
    let (master, slave) = subtle_pair();
    let child = Child::holding(&[master.as_fd(), slave.as_fd()]);
    drop(child.capture());
    let mut captured = child.capture();
    std::mem::take(&mut captured.undo).seal();
    let numbers = [master.as_raw_fd(), slave.as_raw_fd()];
    drop(child);
    check_subtle_pair(master, slave);
    let copy = rebuild(&captured);
    let [master, slave] = numbers.map(|number| copy.of(number));
    drop(copy);
    check_subtle_pair(master, slave);
}

#[test]
fn what_is_left_for_a_master_alone_stays_in_vain_and_moves() {
    new_terminals();
    let (master, slave) = open_pair();
    File::from(slave).write_all(b"last words").unwrap();
    let child = Child::holding(&[master.as_fd()]);
    let number = master.as_raw_fd();
    drop(child.capture());
    let captured = child.capture();
    drop(child);
    let check = |master: OwnedFd| {
        let (mut master, mut buffer) = (File::from(master), [0; 100]);
        let length = master.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"last words");
        assert_eq!(master.read(&mut buffer).unwrap_err().raw_os_error(), Some(libc::EIO));
    };
    check(master);
    let copy = rebuild(&captured);
    let master = copy.of(number);
    drop(copy);
    check(master);
}
