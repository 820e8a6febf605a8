//! Each object is made in a process, captured, rebuilt, and then used.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    fcntl::OFlag,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        stat::Mode,
    },
    unistd::pipe2,
};

use super::testing::{Child, rebuild};

#[test]
fn a_file_keeps_its_offset_and_flags_and_stays_one_description() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let mut log = File::options().create(true).append(true).read(true).open(&path).unwrap();
    log.write_all(b"0123456789").unwrap();
    log.seek(SeekFrom::Start(4)).unwrap();
    let again = log.try_clone().unwrap();
    let apart = File::open(&path).unwrap();
    let child = Child::holding(&[log.as_fd(), again.as_fd(), apart.as_fd()]);
    let (fd, fd_again, fd_apart) = (log.as_raw_fd(), again.as_raw_fd(), apart.as_raw_fd());
    let captured = child.capture();
    drop((log, again, apart, child));

    let copy = rebuild(&captured);
    let (mut log, mut again) = (File::from(copy.of(fd)), File::from(copy.of(fd_again)));
    let mut byte = [0];
    log.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"4");
    again.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"5", "both numbers share one offset");
    let mut all = String::new();
    File::from(copy.of(fd_apart)).read_to_string(&mut all).unwrap();
    assert_eq!(all, "0123456789");
    log.write_all(b"end").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456789end", "O_APPEND is kept");
}

#[test]
fn a_deleted_file_keeps_its_contents_and_stays_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("scratch");
    let mut writer = File::options().create(true).write(true).truncate(true).open(&path).unwrap();
    let reader = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    writer.write_all(b"kept").unwrap();
    writer.set_len(1 << 20).unwrap();
    let child = Child::holding(&[writer.as_fd(), reader.as_fd()]);
    let captured = child.capture();
    let (fd, fd_reader) = (writer.as_raw_fd(), reader.as_raw_fd());
    drop((writer, reader, child));

    let copy = rebuild(&captured);
    assert!(!path.exists());
    let (mut writer, mut reader) = (File::from(copy.of(fd)), File::from(copy.of(fd_reader)));
    writer.write_all(b" and more").unwrap();
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!((&all[..13], all.len()), (&b"kept and more"[..], 1 << 20));
}

#[test]
fn pipes_keep_their_data_packets_and_size() {
    let (reader, writer) = pipe2(OFlag::O_DIRECT).unwrap();
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
    writer.write_all(b"one").unwrap();
    writer.write_all(b"twotwo").unwrap();
    let child = Child::holding(&[reader.as_fd(), writer.as_fd()]);
    let captured = child.capture();
    let (fd_reader, fd_writer) = (reader.as_raw_fd(), writer.as_raw_fd());
    let mut buffer = [0; 100];
    assert_eq!(reader.read(&mut buffer).unwrap(), 3, "the original was not read");
    drop((reader, writer, child));

    let copy = rebuild(&captured);
    let (mut reader, mut writer) = (File::from(copy.of(fd_reader)), File::from(copy.of(fd_writer)));
    assert_eq!(reader.read(&mut buffer).unwrap(), 3);
    assert_eq!(&buffer[..3], b"one");
    assert_eq!(reader.read(&mut buffer).unwrap(), 6);
    let size = nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    assert_eq!(size, 1 << 17);
    writer.write_all(b"x").unwrap();
    drop((writer, copy));
    assert_eq!(reader.read(&mut buffer).unwrap(), 1);
    assert_eq!(reader.read(&mut buffer).unwrap(), 0, "no hidden writer is left");
}

#[test]
fn a_fifo_keeps_its_data_and_its_hang_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let both = File::options().read(true).write(true).open(&path).unwrap();
    (&both).write_all(b"left behind").unwrap();
    let reader = File::open(&path).unwrap();
    drop(both);
    let child = Child::holding(&[reader.as_fd()]);
    let captured = child.capture();
    let fd = reader.as_raw_fd();
    drop((reader, child));

    let copy = rebuild(&captured);
    let mut all = String::new();
    File::from(copy.of(fd)).read_to_string(&mut all).unwrap();
    assert_eq!(all, "left behind");
}

#[test]
fn a_pipe_that_leads_out_of_the_ve_is_a_blocker() {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let child = Child::holding(&[writer.as_fd()]);
    let blockers = child.blockers();
    assert_eq!(blockers.len(), 1);
    assert_eq!(
        blockers[0].to_string().split(';').next().unwrap(),
        format!("pid 7 (holder) fd {}: a pipe with one end outside the VE", writer.as_raw_fd())
    );
    drop(reader);
    assert_eq!(child.blockers(), [], "a closed end is not outside");
}

#[test]
fn counters_signals_and_timers_keep_their_state() {
    use crate::sys::event;
    use nix::sys::{
        eventfd::{EfdFlags, EventFd},
        timerfd,
    };
    let semaphore = EventFd::from_value_and_flags(5, EfdFlags::EFD_SEMAPHORE).unwrap();
    let signals = event::signal(1 << 9 | 1 << 63).unwrap();
    let clock = timerfd::ClockId::CLOCK_MONOTONIC;
    let far = timerfd::TimerFd::new(clock, timerfd::TimerFlags::empty()).unwrap();
    event::arm_timer(far.as_fd(), 0, 3_600_000_000_000, 1_000_000_000).unwrap();
    let fired = timerfd::TimerFd::new(clock, timerfd::TimerFlags::TFD_NONBLOCK).unwrap();
    event::arm_timer(fired.as_fd(), 0, 1_000, 0).unwrap();
    while event::timer_remaining(fired.as_fd()).unwrap().0 != 0 {
        std::thread::yield_now();
    }
    let fds = [semaphore.as_fd(), signals.as_fd(), far.as_fd(), fired.as_fd()];
    let numbers = fds.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&fds);
    let captured = child.capture();
    drop((semaphore, signals, far, fired, child));

    let copy = rebuild(&captured);
    let mut eight = [0; 8];
    let mut semaphore = File::from(copy.of(numbers[0]));
    for _ in 0..5 {
        semaphore.read_exact(&mut eight).unwrap();
        assert_eq!(u64::from_ne_bytes(eight), 1);
    }
    let signals = super::info::Info::of(copy.of(numbers[1]).as_fd()).unwrap();
    assert_eq!(signals.number("sigmask", 16).unwrap(), 1 << 9 | 1 << 63);
    let (remaining, interval) = event::timer_remaining(copy.of(numbers[2]).as_fd()).unwrap();
    assert!((3_500_000_000_000..=3_600_000_000_000).contains(&remaining), "{remaining}");
    assert_eq!(interval, 1_000_000_000);
    let mut fired = File::from(copy.of(numbers[3]));
    fired.read_exact(&mut eight).unwrap();
    assert_eq!(u64::from_ne_bytes(eight), 1);
    assert_eq!(fired.read(&mut eight).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn an_epoll_set_keeps_entries_of_closed_and_reused_numbers() {
    use nix::sys::eventfd::EventFd;
    let inner = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let outer = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let (kept, moved) = (EventFd::from_value(1).unwrap(), EventFd::from_value(2).unwrap());
    let dup = nix::unistd::dup(&moved).unwrap();
    inner.add(&kept, EpollEvent::new(EpollFlags::EPOLLIN, 11)).unwrap();
    inner.add(&dup, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 22)).unwrap();
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 33)).unwrap();
    // The number under which the second was added is not in the process any more.
    let fds = [inner.0.as_fd(), outer.0.as_fd(), kept.as_fd(), moved.as_fd()];
    let numbers = fds.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&fds);
    let captured = child.capture();
    let added_as = dup.as_raw_fd();
    drop((dup, kept, moved, inner, outer, child));

    let copy = rebuild(&captured);
    let inner = Epoll(copy.of(numbers[0]));
    let mut events = [EpollEvent::empty(); 8];
    let outer = Epoll(copy.of(numbers[1]));
    assert_eq!(outer.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1);
    assert_eq!(events[0].data(), 33);
    let count = inner.wait(&mut events, EpollTimeout::ZERO).unwrap();
    let mut data: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
    data.sort_unstable();
    assert_eq!(data, [11, 22]);
    assert_eq!(inner.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1, "EPOLLET fires once");
    let info = super::info::Info::of(inner.0.as_fd()).unwrap();
    let lines: Vec<&str> = info.all("tfd").collect();
    for number in [numbers[2], added_as] {
        let found =
            lines.iter().any(|line| line.split_whitespace().next() == Some(&number.to_string()));
        assert!(found, "{number} in {lines:?}");
    }
}

#[test]
fn devices_of_the_host_are_blockers_and_common_ones_are_not() {
    let null = File::open("/dev/null").unwrap();
    let tun = File::open("/dev/kvm").or_else(|_| File::open("/dev/loop-control"));
    let child = Child::holding(&[null.as_fd()]);
    let captured = child.capture();
    let fd = null.as_raw_fd();
    assert_eq!(File::from(rebuild(&captured).of(fd)).read(&mut [0; 4]).unwrap(), 0);
    if let Ok(device) = tun {
        let child = Child::holding(&[device.as_fd()]);
        assert_eq!(child.blockers().len(), 1);
    }
}
