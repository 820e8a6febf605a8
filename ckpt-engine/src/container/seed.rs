//! The inside of making and entering a container: what the seed program does.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::symlink, process::CommandExt},
    },
    process::{Command, ExitCode},
};

use ckpt_format::container::{Clocks, Container as Plan, Names};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{
        Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid,
        setsid,
    },
};

use super::{
    bench,
    capture::offset_lines,
    limits::drop_capabilities,
    mounts,
    nested::{self, Handles},
    order::{DESCRIPTORS_MAX, Order, Reply, Socket},
    refused::refuse_calls,
};
use crate::sys::{
    clone::{self, DefaultChild, Sibling, SingleThreaded, close_from, default_signals},
    identity::new_session_keyring,
    namespace::{CONTAINER_NAMESPACES, join, unshare},
};

/// What failed, and why: goes back to the daemon.
type Failure = (String, io::Error);

fn at(step: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |source| (step.to_owned(), source)
}

fn system(step: &'static str) -> impl FnOnce(nix::errno::Errno) -> Failure {
    move |source| (step.to_owned(), source.into())
}

/// The main function of a seed: serves the one order that comes on standard input.
///
/// Returns in the seed itself, and in a process that could not become what it should.
pub fn seed_main() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned().map(Socket::new) else {
        return ExitCode::FAILURE;
    };
    // Asked now, while the host's /proc is still in sight.
    let Ok(alone) = SingleThreaded::check() else {
        return ExitCode::FAILURE;
    };
    let outcome = match socket.receive::<Order>() {
        Ok((Order::Create { plan, links, clock_offsets }, mut descriptors)) => {
            match descriptors.pop() {
                Some(channel) => create(&socket, alone, channel, &plan, &links, clock_offsets),
                None => Err(("find the channel".to_owned(), io::ErrorKind::NotFound.into())),
            }
        }
        Ok((Order::Enter { arguments, environment, directory, terminal }, descriptors)) => {
            let program = Inner { arguments, environment, directory, terminal };
            enter(&socket, alone, descriptors, &program)
        }
        _ => return ExitCode::FAILURE,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err((step, source)) => {
            // Whoever asked may be gone; there is nobody else to tell.
            let _ = socket.send(&Reply::failed(step, &source), &[]);
            ExitCode::FAILURE
        }
    }
}

fn create(
    socket: &Socket,
    alone: SingleThreaded,
    channel: OwnedFd,
    plan: &Plan,
    links: &[(String, String)],
    clock_offsets: Option<Clocks>,
) -> Result<(), Failure> {
    unshare(libc::CLONE_NEWUSER).map_err(at("make a user namespace"))?;
    let told = socket.send(&Reply::Unshared, &[]);
    let root = match told.and_then(|()| socket.receive::<Order>()) {
        Ok((Order::Mapped, descriptors)) => <[OwnedFd; 2]>::try_from(descriptors).ok(),
        _ => None,
    };
    let root = root.ok_or_else(|| at("receive the root")(io::ErrorKind::UnexpectedEof.into()))?;
    become_root()?;
    // What becomes another user is unreadable, even to itself: its /proc would belong to the host.
    nix::sys::prctl::set_dumpable(true).map_err(system("become readable"))?;
    unshare(CONTAINER_NAMESPACES & !libc::CLONE_NEWUSER).map_err(at("leave the namespaces"))?;
    if let Some(offsets) = clock_offsets {
        std::fs::write("/proc/self/timens_offsets", offset_lines(offsets))
            .map_err(at("set the clocks"))?;
    }
    match alone.clone_sibling().map_err(at("make pid 1"))? {
        Sibling::Caller(pid, pidfd) => {
            // What pid 1 alone is to hold.
            drop((channel, root));
            let _ = socket.send(&Reply::Born { pid }, &[pidfd.as_fd()]);
            if plan.has_overlays() {
                bench::serve(socket);
            }
            Ok(())
        }
        Sibling::Child => {
            let (trees, nested, late) = first_process(plan, links, root)?;
            let (counts, namespaces) = nested.counted();
            let beside = trees.iter().chain(namespaces).chain(&late);
            let beside: Vec<_> = beside.map(AsFd::as_fd).collect();
            for some in beside.chunks(DESCRIPTORS_MAX) {
                let _ = socket.send(&Reply::Descriptors, some);
            }
            let (trees_count, late_count) = (trees.len(), late.len());
            let ready = Reply::Ready { trees: trees_count, nested: counts, late: late_count };
            let _ = socket.send(&ready, &[]);
            drop((trees, nested, late));
            wait_for_init(channel).map(|never| match never {})
        }
    }
}

/// Root of the user namespace, and nobody else.
///
/// The session keyring, which gives whoever has it what the daemon has in its own, is left first.
/// Then it becomes one of the VE itself, unless the VE has used up what it may have of keys.
fn become_root() -> Result<(), Failure> {
    new_session_keyring().map_err(at("leave the session keyring"))?;
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).map_err(system("drop the groups"))?;
    setresgid(group, group, group).map_err(system("become root's group"))?;
    setresuid(user, user, user).map_err(system("become root"))?;
    let _ = new_session_keyring();
    Ok(())
}

/// What pid 1 does before it waits.
fn first_process(
    plan: &Plan,
    links: &[(String, String)],
    [root, devices]: [OwnedFd; 2],
) -> Result<(Vec<OwnedFd>, Handles, Vec<OwnedFd>), Failure> {
    setsid().map_err(system("start a session"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let (hostname, domainname) = (plan.hostname.clone(), plan.domainname.clone());
    nested::set_names(&Names { hostname, domainname }).map_err(at("set the names"))?;
    let own = nested::Own::find().map_err(at("find the namespaces"))?;
    raise_descriptor_limit().map_err(at("have room for descriptors"))?;
    let mut handles = nested::make(&plan.nested, &own)?;
    let mounts::Built { trees, namespaces, late } =
        mounts::build(plan, (root, devices), &own, &handles)?;
    handles.mounts = namespaces;
    drop(own);
    lower_descriptor_limit().map_err(at("limit the descriptors"))?;
    // Whatever this process becomes, and all that come from it, have the filter.
    refuse_calls().map_err(at("filter system calls"))?;
    for (name, target) in links {
        match symlink(target, name) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err((format!("make {name}"), source));
            }
            _ => (),
        }
    }
    Ok((trees, handles, late))
}

/// Every mount takes a descriptor until all stand.
fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// What init has on a host (`INR_OPEN_CUR` in include/uapi/linux/fs.h). The daemon's own limit is
/// much larger, and programs that close all that they might have open take seconds with it.
fn lower_descriptor_limit() -> io::Result<()> {
    const USUAL: u64 = 1024;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, USUAL.min(hard), hard)?)
}

/// Waits on descriptor 3 with nothing else open, for as long as the daemon lives.
fn wait_for_init(channel: OwnedFd) -> Result<Infallible, Failure> {
    default_signals(DefaultChild::Ignored).map_err(at("reset the signals"))?;
    let socket = Socket::new(clone::only_descriptor(channel, 3).map_err(at("keep a channel"))?);
    // A daemon that has gone is seen below.
    let _ = socket.send(&Reply::Alone, &[]);
    if let Ok((Order::Init { arguments, environment }, _)) = socket.receive::<Order>() {
        let (step, source) = become_init(&arguments, &environment);
        // The daemon may be gone; then nobody waits for this.
        let _ = socket.send(&Reply::failed(step, &source), &[]);
    }
    // Either that failed, or the daemon is gone and with it whoever could use this container.
    // Not by returning: the callers' descriptors are closed behind their backs.
    #[expect(clippy::exit, reason = "nothing of the callers may run any more")]
    std::process::exit(1)
}

/// Returns only if it failed.
fn become_init(
    arguments: &[String],
    environment: &[(String, String)],
) -> (&'static str, io::Error) {
    let prepared = || -> Result<(), (&'static str, io::Error)> {
        let nowhere = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|source| ("open /dev/null", source))?;
        let failed = |source: nix::errno::Errno| ("set standard streams up", source.into());
        dup2_stdin(&nowhere).map_err(failed)?;
        dup2_stdout(&nowhere).map_err(failed)?;
        dup2_stderr(&nowhere).map_err(failed)?;
        // It may have become one of the three.
        std::mem::forget(nowhere);
        close_from(4).map_err(|source| ("close the rest", source))?;
        default_signals(DefaultChild::Default).map_err(|source| ("reset the signals", source))?;
        drop_capabilities().map_err(|source| ("drop capabilities", source))
    };
    match prepared() {
        Ok(()) => ("run init", execute(arguments, environment)),
        Err(failure) => failure,
    }
}

/// Replaces the process. Returns only if that failed.
fn execute(arguments: &[String], environment: &[(String, String)]) -> io::Error {
    let Some((program, rest)) = arguments.split_first() else {
        return io::ErrorKind::InvalidInput.into();
    };
    // std looks a bare name up in the PATH of the new environment.
    let variables = environment.iter().map(|(key, value)| (OsString::from(key), value));
    Command::new(program).args(rest).env_clear().envs(variables).exec()
}

/// A program to run in a container.
struct Inner {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    directory: String,
    terminal: bool,
}

fn enter(
    socket: &Socket,
    alone: SingleThreaded,
    descriptors: Vec<OwnedFd>,
    program: &Inner,
) -> Result<(), Failure> {
    let count = descriptors.len();
    let Ok([init, input, output, errors]) = <[OwnedFd; 4]>::try_from(descriptors) else {
        let source = io::Error::other(format!("{count} descriptors"));
        return Err(("receive the descriptors".to_owned(), source));
    };
    join(init.as_fd(), CONTAINER_NAMESPACES).map_err(at("join the namespaces"))?;
    become_root()?;
    match alone.clone_sibling().map_err(at("make the process"))? {
        Sibling::Caller(pid, pidfd) => {
            let _ = socket.send(&Reply::Born { pid }, &[pidfd.as_fd()]);
            return Ok(());
        }
        Sibling::Child => (),
    }
    setsid().map_err(system("start a session"))?;
    if program.terminal {
        clone::take_terminal(input.as_fd()).map_err(at("take the terminal"))?;
    }
    lower_descriptor_limit().map_err(at("limit the descriptors"))?;
    chdir(program.directory.as_str()).map_err(system("change to the directory"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    refuse_calls().map_err(at("filter system calls"))?;
    drop_capabilities().map_err(at("drop capabilities"))?;
    default_signals(DefaultChild::Default).map_err(at("reset the signals"))?;
    let failed = system("set standard streams up");
    dup2_stdin(&input)
        .and_then(|()| dup2_stdout(&output))
        .and_then(|()| dup2_stderr(&errors))
        .map_err(failed)?;
    // What the daemon inherited from whoever started it must not get into a VE: a descriptor with
    // its other end outside could never be moved.
    clone::close_on_exec_from(3).map_err(at("keep descriptors out"))?;
    let source = execute(&program.arguments, &program.environment);
    Err((format!("run {}", program.arguments.first().map_or("", String::as_str)), source))
}
