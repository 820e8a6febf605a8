//! Descriptors of what has lost its name, what is only named, and what is said of files.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
            net::UnixListener,
        },
    },
    path::Path,
};

use ckpt_format::files::BusyPoll;
use nix::{
    fcntl::{OFlag, open, readlinkat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, makedev, mknod},
};

use super::{
    find::own_link,
    testing::{Child, rebuild},
};
use crate::sys::{
    descriptor::{self, Query},
    event,
};

fn fifo(path: &Path, mode: u32) {
    nix::unistd::mkfifo(path, Mode::empty()).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn device(path: &Path, number: u64) {
    mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR, number).unwrap();
}

fn named(path: &Path) -> OwnedFd {
    open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
}

/// What can be seen of something that is only named.
fn look(fd: &OwnedFd) -> (Vec<u8>, u32, u32, u32, u32) {
    let status = descriptor::status(fd.as_fd()).unwrap();
    (own_link(fd.as_fd()).unwrap(), status.mode, status.links, status.uid, status.gid)
}

#[test]
fn what_is_only_named_and_has_no_name_is_the_same_thing() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    symlink("elsewhere", path("link")).unwrap();
    std::os::unix::fs::lchown(path("link"), Some(5), Some(7)).unwrap();
    fifo(&path("fifo"), 0o620);
    drop(UnixListener::bind(path("socket")).unwrap());
    device(&path("device"), makedev(5, 2));
    fs::write(path("file"), "text").unwrap();
    fs::set_permissions(path("file"), fs::Permissions::from_mode(0o600)).unwrap();
    let names = ["link", "link", "fifo", "socket", "file", "device"];
    let held = names.map(|name| named(&path(name)));
    names[1..].iter().for_each(|name| fs::remove_file(path(name)).unwrap());
    fs::write(path("link"), "the new one").unwrap();
    let seen = held.each_ref().map(look);
    let numbers = held.each_ref().map(AsRawFd::as_raw_fd);
    let child = Child::holding(&held.each_ref().map(AsFd::as_fd));
    let captured = child.capture();
    drop((held, child));

    let copy = rebuild(&captured);
    let copies = numbers.map(|number| copy.of(number));
    assert_eq!(copies.each_ref().map(look), seen);
    assert_eq!(readlinkat(&copies[1], c"").unwrap().to_str(), Some("elsewhere"));
    let inode = |fd: &OwnedFd| descriptor::status(fd.as_fd()).unwrap().inode;
    assert_eq!(inode(&copies[0]), inode(&copies[1]), "one link stays one");
    let file = format!("/proc/self/fd/{}", copies[4].as_raw_fd());
    assert_eq!(fs::read_to_string(file).unwrap(), "text");
    assert_eq!(descriptor::status(copies[5].as_fd()).unwrap().special, makedev(5, 2));
    assert_eq!(fs::read_to_string(path("link")).unwrap(), "the new one");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn no_device_is_made_that_a_ve_may_not_have() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device");
    let held = [makedev(5, 2), makedev(1, 1)].map(|number| {
        device(&path, number);
        let held = named(&path);
        fs::remove_file(&path).unwrap();
        held
    });
    let child = Child::holding(&[held[1].as_fd()]);
    assert_eq!(child.blockers().len(), 1);
    let child = Child::holding(&[held[0].as_fd()]);
    let mut captured = child.capture();
    captured.files.nodes[0].device = Some((1, 1));
    let refused = super::rebuild(&captured.files, &super::Target::new(0).unwrap());
    assert!(matches!(refused, Err(super::RebuildError::Damaged)), "{refused:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_fifo_without_a_name_is_not_that_which_has_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    let both = || File::options().read(true).write(true).open(&path).unwrap();
    fifo(&path, 0o600);
    let (old, only_named) = (both(), named(&path));
    (&old).write_all(b"old").unwrap();
    fs::remove_file(&path).unwrap();
    fifo(&path, 0o640);
    let new = both();
    (&new).write_all(b"new").unwrap();
    let child = Child::holding(&[only_named.as_fd(), old.as_fd(), new.as_fd()]);
    let numbers = [only_named.as_raw_fd(), old.as_raw_fd(), new.as_raw_fd()];
    let captured = child.capture();
    drop((old, new, only_named, child));

    let copy = rebuild(&captured);
    let [only_named, old, new] = numbers.map(|number| copy.of(number));
    let inode = |fd: &OwnedFd| descriptor::status(fd.as_fd()).unwrap().inode;
    assert_eq!(inode(&only_named), inode(&old));
    assert_eq!(inode(&new), fs::metadata(&path).unwrap().ino());
    for (fd, text) in [(old, b"old"), (new, b"new")] {
        let mut found = [0; 3];
        File::from(fd).read_exact(&mut found).unwrap();
        assert_eq!(&found, text);
    }
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
}

#[test]
fn a_file_gains_no_flag_and_keeps_what_is_said_of_its_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let plain = File::create(&path).unwrap();
    descriptor::set_write_hint(plain.as_fd(), 4).unwrap();
    let own = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path).unwrap();
    let null = File::open("/dev/null").unwrap();
    let epoll = event::epoll().unwrap();
    let busy = BusyPoll { microseconds: 70, packets: 8, preferred: false };
    event::set_busy_poll(epoll.as_fd(), busy).unwrap();
    let held = [plain.as_fd(), own.as_fd(), null.as_fd(), epoll.as_fd()];
    let flags = |fd: BorrowedFd<'_>| descriptor::query(fd, Query::GetFlags).unwrap();
    let (numbers, before) = (held.map(|fd| fd.as_raw_fd()), held.map(flags));
    let child = Child::holding(&held);
    let captured = child.capture();
    // Else its inode, which has the hint, stays as it is.
    fs::write(directory.path().join("copy"), "").unwrap();
    fs::rename(directory.path().join("copy"), &path).unwrap();
    drop((plain, own, child));

    let copy = rebuild(&captured);
    let copies = numbers.map(|number| copy.of(number));
    assert_eq!(copies.each_ref().map(|fd| flags(fd.as_fd())), before);
    assert_eq!(descriptor::write_hint(copies[0].as_fd()).unwrap(), 4);
    assert_eq!(event::busy_poll(copies[3].as_fd()).unwrap(), Some(busy));
}

#[test]
fn nothing_is_opened_through_a_link_that_was_put_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let held = File::create(&path).unwrap();
    let child = Child::holding(&[held.as_fd()]);
    let captured = child.capture();
    fs::rename(&path, directory.path().join("other")).unwrap();
    symlink("other", &path).unwrap();
    let refused = super::rebuild(&captured.files, &super::Target::new(0).unwrap());
    assert!(matches!(refused, Err(super::RebuildError::Open { .. })), "{refused:?}");
}

#[test]
fn a_place_that_is_not_mounted_any_more_is_a_blocker() {
    let directory = tempfile::tempdir().unwrap();
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("none"), directory.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::env::set_current_dir(directory.path()).unwrap();
    let blockers = || super::check(&Child::holding(&[]).source());
    assert_eq!(blockers(), []);
    umount2(directory.path(), MntFlags::MNT_DETACH).unwrap();
    let found = blockers();
    assert_eq!(found.len(), 1);
    assert!(found[0].object.starts_with("a working directory in"), "{found:?}");
}
