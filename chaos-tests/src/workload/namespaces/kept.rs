//! Namespaces that no process is in.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::umount;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::utsname::uname;
use nix::unistd::sethostname;

use crate::workload::context::Context;
use crate::workload::mounts::table::{Ground, bind};
use crate::workload::outcome::{Failure, same};
use crate::workload::process::proc_text;

const PAUSE: Duration = Duration::from_millis(15);
const TTL: &str = "/proc/sys/net/ipv4/ip_default_ttl";
const KINDS: CloneFlags = CloneFlags::CLONE_NEWUTS.union(CloneFlags::CLONE_NEWNET);

/// Runs on a thread of its own, which is in the workload's namespaces before and gone afterwards.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
}

/// Makes a UTS and a network namespace that nobody is in afterwards.
fn make<T: Send>(
    keep: impl Fn(&Path) -> Result<T, Failure> + Send + Sync,
) -> Result<[T; 2], Failure> {
    apart(|| {
        unshare(KINDS)?;
        sethostname("kept")?;
        fs::write(TTL, "33")?;
        let own = Path::new("/proc/thread-self/ns");
        Ok([keep(&own.join("uts"))?, keep(&own.join("net"))?])
    })
}

/// Goes in and looks; and there does what `also` does.
fn look([names, network]: [&File; 2], also: impl FnOnce() + Send) -> Result<(), Failure> {
    apart(|| {
        setns(names.as_fd(), CloneFlags::CLONE_NEWUTS)?;
        setns(network.as_fd(), CloneFlags::CLONE_NEWNET)?;
        also();
        same("host name", uname()?.nodename().to_string_lossy().into_owned(), "kept".to_owned())?;
        same("a setting of the network", proc_text(TTL)?.trim(), "33")
    })
}

fn damage() {
    // Whether it worked shows at once.
    let _ = fs::write(TTL, "34");
}

pub(super) fn open(context: &mut Context) -> Result<(), Failure> {
    let [names, network] = make(|path| Ok(File::open(path)?))?;
    while context.step(PAUSE)? {
        let plant = context.progress.plant();
        look([&names, &network], || {
            if plant {
                damage()
            }
        })?;
    }
    Ok(())
}

pub(super) fn mounted(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let places: [PathBuf; 2] = [ground.file("names")?, ground.file("network")?];
    let kept = make(|path| Ok(File::open(path)?))?;
    for (kept, place) in kept.iter().zip(&places) {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(kept));
        bind(Path::new(&path), place)?;
    }
    drop(kept);
    while context.step(PAUSE)? {
        let plant = context.progress.plant();
        let opened = [File::open(&places[0])?, File::open(&places[1])?];
        look([&opened[0], &opened[1]], || {
            if plant {
                damage()
            }
        })?;
    }
    places.iter().try_for_each(|place| Ok(umount(place)?))
}
