//! Files of `/proc` and `/sys`, and programs whose files are replaced.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

fn read_again(file: &mut File) -> Result<String, Failure> {
    // At once: the kernel makes the text up anew for each part.
    let mut bytes = vec![0; 64 << 10];
    file.rewind()?;
    let count = file.read(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

pub(super) fn proc(context: &mut Context) -> Result<(), Failure> {
    let child = Child::start(context, "subject", |stop| {
        while !stop.wait(Duration::from_millis(50))? {}
        Ok(())
    })?;
    let folder: OwnedFd = File::open(format!("/proc/{}", child.pid))?.into();
    let mut status = File::open(format!("/proc/{}/status", child.pid))?;
    let mut own = File::open("/proc/self/stat")?;
    let mut mounts = File::open("/proc/self/mountinfo")?;
    // Others may mount something meanwhile.
    let roots = |text: &str| text.lines().filter(|it| it.split(' ').nth(4) == Some("/")).count();
    let points = roots(&fs::read_to_string("/proc/self/mountinfo")?);
    let uptime = File::open("/proc/uptime")?;
    let (pid, parent) = (child.pid.as_raw(), nix::unistd::getpid().as_raw());
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        let text = read_again(&mut status)?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().parse::<i32>().ok())
        };
        let planted = i32::from(context.progress.plant());
        same("whose status it is", value("Pid:"), Some(pid + planted))?;
        same("the parent in it", value("PPid:"), Some(parent))?;
        let text = read_again(&mut own)?;
        let first = text.split(' ').next().unwrap_or_default();
        same("our own number", first, parent.to_string().as_str())?;
        let opened = openat(&folder, "comm", OFlag::O_RDONLY, Mode::empty())?;
        let mut name = String::new();
        File::from(opened).read_to_string(&mut name)?;
        ensure(!name.is_empty(), || "a process without a name".to_owned())?;
        same("mounts on /", roots(&read_again(&mut mounts)?), points)?;
        let mut first = [0; 16];
        let count = std::os::unix::fs::FileExt::read_at(&uptime, &mut first, 0)?;
        ensure(count > 3, || "no time in /proc/uptime".to_owned())?;
    }
    child.finish()
}

/// What is open of a process, and of a thread, that is no more.
pub(super) fn proc_gone(context: &mut Context) -> Result<(), Failure> {
    let child = Child::start(context, "gone", |stop| {
        while !stop.wait(Duration::from_millis(50))? {}
        Ok(())
    })?;
    let directory = format!("/proc/{}", child.pid);
    let names = ["stat", "status", "maps", "limits", "oom_score_adj"];
    let mut files = Vec::new();
    for name in names {
        files.push(File::open(format!("{directory}/{name}"))?);
    }
    files.push(File::open(format!("{directory}/task/{}/stat", child.pid))?);
    let folder = File::open(format!("{directory}/task"))?;
    child.finish()?;
    let thread = std::thread::spawn(|| File::open("/proc/thread-self/stat"));
    let of_thread = thread.join().map_err(|_| Failure::new("the thread panicked"))??;
    let links = files.iter().map(link).collect::<Result<Vec<_>, _>>()?;
    while context.step(Duration::from_millis(8))? {
        if context.progress.plant() {
            files[0] = File::open("/proc/self/stat")?;
        }
        for file in files.iter().chain([&of_thread]) {
            let found = std::os::unix::fs::FileExt::read_at(file, &mut [0; 64], 0);
            let error = found.err().and_then(|error| error.raw_os_error());
            same("reading of a process that is gone", error, Some(libc::ESRCH))?;
        }
        for (file, link_before) in files.iter().zip(&links) {
            same("its name", &link(file)?, link_before)?;
        }
        let inside = openat(&folder, "1", OFlag::O_RDONLY, Mode::empty()).map(drop);
        same("a folder of a process that is gone", inside, Err(nix::Error::ESRCH))?;
    }
    Ok(())
}

fn link(file: &File) -> Result<PathBuf, Failure> {
    Ok(fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))?)
}

pub(super) fn sys(context: &mut Context) -> Result<(), Failure> {
    let mut link = File::open("/sys/class/net/lo/mtu")?;
    let folder: OwnedFd = File::open("/sys/class/net")?.into();
    let before = read_again(&mut link)?;
    while context.step(Duration::from_millis(8))? {
        let mut found = read_again(&mut link)?;
        if context.progress.plant() {
            found.push('0');
        }
        same("the size of a frame", &found, &before)?;
        let opened = openat(&folder, "lo/ifindex", OFlag::O_RDONLY, Mode::empty())?;
        let mut index = String::new();
        File::from(opened).read_to_string(&mut index)?;
        same("the number of the first interface", index.as_str(), "1\n")?;
    }
    Ok(())
}

/// Runs a copy of this program as another workload, then replaces the copy.
pub(super) fn program(context: &mut Context) -> Result<(), Failure> {
    let copy = context.path("program");
    fs::copy("/proc/self/exe", &copy)?;
    let newer = context.path("newer");
    fs::write(&newer, b"a newer version")?;
    run(
        context,
        &copy,
        "/program (deleted)",
        || Ok(fs::rename(&newer, &copy)?),
        || same("the newer version", fs::read(&copy)?, b"a newer version".to_vec()),
    )
}

/// The same, but the copy is a memory file that stays open for reading and writing.
pub(super) fn program_in_memory(context: &mut Context) -> Result<(), Failure> {
    let mut copy = File::from(ckpt_engine::sys::task::memfd("program")?);
    std::io::copy(&mut File::open("/proc/self/exe")?, &mut copy)?;
    let end = copy.stream_position()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", copy.as_raw_fd()));
    run(
        context,
        &path,
        "/memfd:program (deleted)",
        || Ok(()),
        || same("where its copy is written", (&copy).stream_position()?, end),
    )
}

/// Runs a program as another workload. After its start `begin` does something to it; `look` sees
/// that it stays so.
fn run(
    context: &mut Context,
    program: &Path,
    name: &str,
    begin: impl FnOnce() -> Result<(), Failure>,
    look: impl Fn() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let folder = context.path("run");
    let log = context.path("output");
    let mut command = Command::new(program);
    command.args(["workload", "devices", "--dir"]).arg(&folder);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(File::create(&log)?);
    let mut running = command.spawn()?;
    let status = format!("/proc/{}/exe", running.id());
    begin()?;
    let shown = fs::read_link(&status)?;
    let deleted = shown.to_string_lossy().ends_with(name);
    ensure(deleted, || format!("its program: {}", shown.display()))?;
    let size = fs::metadata("/proc/self/exe")?.len();
    let result = loop {
        if !context.step(Duration::from_millis(20))? {
            break Ok(());
        }
        if context.progress.plant() {
            running.kill()?;
            running.wait()?;
        }
        if let Some(status) = running.try_wait()? {
            let said = fs::read_to_string(&log).unwrap_or_default();
            break Err(Failure::new(format!("its program ended: {status} {said}")));
        }
        same("the link to its program", fs::read_link(&status)?, shown.clone())?;
        same("the size of its program", File::open(&status)?.metadata()?.len(), size)?;
        look()?;
    };
    drop(running.stdin.take());
    result?;
    let status = running.wait()?;
    ensure(status.success(), || format!("its program ended: {status}"))
}

pub(super) fn flags(context: &mut Context) -> Result<(), Failure> {
    use ckpt_engine::sys::descriptor;
    use ckpt_engine::sys::program::descriptor::{Fcntl, fcntl};
    use nix::fcntl::{FcntlArg, FdFlag};
    let path = context.path("flags");
    fs::write(&path, b"x")?;
    let open = |flags| nix::fcntl::open(&path, flags, Mode::empty());
    let kept = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DSYNC | libc::O_SYNC | libc::O_NOATIME;
    let sync = open(OFlag::O_WRONLY | OFlag::O_SYNC | OFlag::O_CLOEXEC)?;
    let (null, own) = (File::open("/dev/null")?, open(OFlag::O_RDONLY | OFlag::O_NOFOLLOW)?);
    let plain = [null.as_fd(), own.as_fd(), sync.as_fd()];
    let all = || plain.map(|fd| fcntl(fd, Fcntl::GetFlags).unwrap_or(-1));
    let (before, expected_life) = (all(), 3);
    descriptor::set_write_hint(sync.as_fd(), expected_life)?;
    let append = open(OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_NOATIME)?;
    let twin = append.try_clone()?;
    nix::fcntl::fcntl(&twin, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        let ask = |fd: &OwnedFd| fcntl(fd.as_fd(), Fcntl::GetFlags);
        same("flags of one that waits for the disk", ask(&sync)? & kept, libc::O_SYNC)?;
        let blocking = if turn % 2 == 0 { 0 } else { libc::O_NONBLOCK };
        let expected = libc::O_APPEND | libc::O_NOATIME | blocking;
        same("flags of one that appends", ask(&append)? & kept, expected)?;
        same("all flags of some files", all(), before)?;
        same("how long its data live", descriptor::write_hint(sync.as_fd())?, expected_life)?;
        same("flags of its twin", ask(&twin)? & kept, expected)?;
        same("access", ask(&twin)? & libc::O_ACCMODE, libc::O_RDWR)?;
        let closes = |fd: &OwnedFd| nix::fcntl::fcntl(fd, FcntlArg::F_GETFD);
        same("closed at exec", closes(&sync)?, FdFlag::FD_CLOEXEC.bits())?;
        same("not closed at exec", closes(&twin)?, 0)?;
        turn += 1;
        let blocking = if turn % 2 == 0 { 0 } else { libc::O_NONBLOCK };
        fcntl(append.as_fd(), Fcntl::SetFlags(libc::O_APPEND | libc::O_NOATIME | blocking))?;
        if context.progress.plant() {
            fcntl(twin.as_fd(), Fcntl::SetFlags(0))?;
        }
    }
    Ok(())
}
