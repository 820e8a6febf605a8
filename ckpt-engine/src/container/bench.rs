//! Where overlays of programs are made: a process that is root in the container's user namespace
//! and sees the container's mounts, but is none of its processes.
//!
//! Their layers must have all their files by then, so it waits from the container's beginning: it
//! is the seed, which otherwise would have gone. What it mounts and unmounts is seen by nobody
//! else. It ends with the [`Bench`], or when the daemon ends.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use ckpt_format::container::{Filesystem, MountOption};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::{
    ContainerError, Reaped,
    mounts::relative,
    order::{Order, Reply, Socket},
};
use crate::sys::{
    mount::{FilesystemContext, attach, clone_tree, set_attributes, set_private_recursively},
    namespace::{join, unshare},
};

/// The longest value of an option that fsconfig(2) takes, with its end.
const VALUE_MAX: usize = 256;

/// An overlay to make.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// How it is called later.
    number: u32,
    source: String,
    options: Vec<MountOption>,
    /// What has to be unmounted before its paths lead to its layers.
    covers: Vec<String>,
    /// Overlays made before that have to be mounted: number, where, what of it.
    on: Vec<(u32, String, String)>,
}

/// The daemon's end.
#[derive(Debug)]
pub struct Bench {
    socket: Socket,
    _seed: Reaped,
}

impl Bench {
    pub(super) fn new(socket: Socket, seed: Reaped) -> Self {
        Self { socket, _seed: seed }
    }

    /// Makes an overlay, as a detached mount, by paths as a mount namespace shows them without its
    /// `covers`. `on` are those made before that it needs.
    pub(super) fn make(
        &self,
        number: u32,
        filesystem: &Filesystem,
        covers: &[String],
        namespace: BorrowedFd<'_>,
        on: Vec<(u32, String, String)>,
    ) -> io::Result<OwnedFd> {
        let (source, options) = (filesystem.source.clone(), filesystem.options.clone());
        let job = Job { number, source, options, covers: covers.to_vec(), on };
        let other = |error: ContainerError| match error {
            ContainerError::Inside { step, source } => {
                io::Error::new(source.kind(), format!("cannot {step}: {source}"))
            }
            other => io::Error::other(other),
        };
        self.socket.send(&Order::Overlay(Box::new(job)), &[namespace]).map_err(other)?;
        match self.socket.receive::<Reply>().map_err(other)? {
            (Reply::Descriptors, mut made) => {
                made.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
            }
            (reply, _) => Err(other(reply.into_error("an overlay"))),
        }
    }
}

/// What failed, and why.
type Failure = (String, io::Error);

/// What the seed does until the daemon has enough.
pub(super) fn serve(socket: &Socket) {
    let mut made = BTreeMap::new();
    while let Ok((Order::Overlay(job), mut descriptors)) = socket.receive::<Order>() {
        let namespace = descriptors.pop().ok_or_else(|| io::ErrorKind::NotFound.into());
        let done = namespace.map_err(|source| ("find the mounts".to_owned(), source));
        let told = match done.and_then(|namespace| make(&job, &namespace, &mut made)) {
            Ok(overlay) => socket.send(&Reply::Descriptors, &[overlay.as_fd()]),
            Err((step, source)) => socket.send(&Reply::failed(step, &source), &[]),
        };
        if told.is_err() {
            return;
        }
    }
}

fn make(
    job: &Job,
    namespace: &OwnedFd,
    made: &mut BTreeMap<u32, OwnedFd>,
) -> Result<OwnedFd, Failure> {
    let at = |what: &str| {
        let what = what.to_owned();
        move |source| (what, source)
    };
    let enter = || {
        join(namespace.as_fd(), libc::CLONE_NEWNS)?;
        unshare(libc::CLONE_NEWNS)?;
        set_private_recursively(File::open("/")?.as_fd())?;
        nix::unistd::chdir("/")?;
        Ok(())
    };
    enter().map_err(at("copy the mounts around an overlay"))?;
    for cover in &job.covers {
        umount2(cover.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| (format!("take away what is on {cover}"), errno.into()))?;
    }
    for (number, point, root) in &job.on {
        let mut stand = || {
            let kept = made.get_mut(number).ok_or(io::ErrorKind::NotFound)?;
            // Kernels before 6.15 clone attached mounts only.
            let aside = File::open("/proc")?;
            attach(kept.as_fd(), aside.as_fd(), Path::new(""))?;
            let part = clone_tree(kept.as_fd(), relative(root))?;
            let again = clone_tree(kept.as_fd(), Path::new(""))?;
            umount2("/proc", MntFlags::MNT_DETACH)?;
            *kept = again;
            attach(part.as_fd(), File::open("/")?.as_fd(), relative(point))
        };
        stand().map_err(at(&format!("mount on {point} what an overlay is made of")))?;
    }
    forget_last_user(job).map_err(at("prepare the work directory of an overlay"))?;
    let overlay = layered(job).map_err(at("make an overlay"))?;
    let keep = || {
        set_attributes(overlay.as_fd(), 0)?;
        let kept = clone_tree(overlay.as_fd(), Path::new(""))?;
        let own = clone_tree(overlay.as_fd(), Path::new(""))?;
        umount2("/proc", MntFlags::MNT_DETACH)?;
        Ok((kept, own))
    };
    let (kept, own) = keep().map_err(at("keep an overlay"))?;
    made.insert(job.number, kept);
    Ok(own)
}

/// An overlay that is mounted on `/proc`, which nothing here needs.
fn layered(job: &Job) -> io::Result<OwnedFd> {
    let value = |option: &MountOption| option.value.as_ref().map_or(0, String::len);
    if job.options.iter().all(|option| value(option) < VALUE_MAX) {
        let context = FilesystemContext::open("overlay")?;
        let source = Some(job.source.as_str()).filter(|source| !source.is_empty());
        context.set("source", source.or(Some("overlay")))?;
        for option in &job.options {
            context.set(&option.name, option.value.as_deref())?;
        }
        let made = context.mount(0)?;
        attach(made.as_fd(), File::open("/proc")?.as_fd(), Path::new(""))?;
        return Ok(made);
    }
    let read_only = job.options.iter().any(|option| option.name == "ro");
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let words: Vec<String> = job
        .options
        .iter()
        .filter(|option| option.name != "ro")
        .map(|option| match &option.value {
            Some(value) => format!("{}={}", option.name, value.replace(',', "\\,")),
            None => option.name.clone(),
        })
        .collect();
    let (source, words) = (job.source.as_str(), words.join(","));
    mount(Some(source), "/proc", Some("overlay"), flags, Some(words.as_str()))?;
    Ok(File::open("/proc")?.into())
}

/// An overlay that keeps nothing on disks (`volatile`) leaves a mark for the next one to refuse.
fn forget_last_user(job: &Job) -> io::Result<()> {
    let work = job.options.iter().find(|option| option.name == "workdir");
    let Some(work) = work.and_then(|option| option.value.as_ref()) else { return Ok(()) };
    match fs::remove_dir_all(Path::new(work).join("work/incompat")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
