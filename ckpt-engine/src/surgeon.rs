//! Reaches into the processes of a running VE, and ends what it has begun.
//!
//! When a tracer dies the kernel lets its tracees go with whatever registers and signal mask they
//! have just then: a process that was about to make a call of ours would run on in our code and
//! die. So everything that changes a thread of a VE on the source, if only for microseconds, is
//! done by a [`serve`]r in a process of its own, which a daemon asks through a [`Surgeon`]. A
//! daemon may die at any moment; its surgeon puts every thread back before it ends.

use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use ckpt_format::{
    codec,
    files::Files,
    ipc::SemaphoreSet,
    process::{Process, Processes},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    aio,
    capture::{
        self, CaptureError, IdMap,
        kernel::{Fields, View},
    },
    freeze::Frozen,
    inject::{InjectError, Stopped, Vdso},
    ipc::{self, Letters, Mailboxes},
    message::{receive, send},
    sys::{
        ptrace, task,
        userfault::{self, Tracking},
    },
};

/// How long one operation may take. Each wait in it has a bound of its own, which is shorter.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process to be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patient {
    /// Its number on the host, or that of a thread if the first one has ended.
    pub host: i32,
    /// The first one, where that has ended.
    pub ended: Option<i32>,
    /// Its number inside the VE.
    pub inner: i32,
    /// Its vdso.
    pub vdso: Option<Vdso>,
    /// The number of its IPC namespace.
    pub ipc: u32,
    /// Whether it has rings of AIO contexts.
    pub rings: bool,
}

/// As long as this is the same, the areas of a process are, in every respect: the kernel counts
/// how often it has locked them to change something (`mm_lock_seq` in include/linux/mm_types.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AreasMark {
    /// Where the kernel keeps them.
    pub memory: u64,
    /// How often they were locked.
    pub locked: u32,
    /// How many programs the process has executed.
    pub executed: u32,
}

/// As long as this is the same, a process is the same one, with the same relations to others. All
/// numbers are those of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KinMark {
    /// When it was born: `CLOCK_BOOTTIME`.
    pub born_ns: u64,
    /// Whether it has ended.
    pub dead: bool,
    /// Which signal tells its parent of its end.
    pub exit_signal: i32,
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// Where the kernel keeps its descriptors.
    pub descriptors: u64,
    /// Where the kernel keeps its directories.
    pub directories: u64,
}

/// What the kernel tells of a process at a look at all of a VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Of the process.
    pub kin: KinMark,
    /// Of its memory; `None` where it has none, or the kernel does not tell.
    pub areas: Option<AreasMark>,
    /// Where the kernel keeps the namespaces that it is in, and those that its children will be in. As
    /// long as somebody holds them they are the same ones.
    pub places: [u64; 9],
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Arm { host: i32, vdso: Vdso },
    Marks { fields: Fields, init: i32 },
    Learn { fields: Fields, patients: Vec<Patient>, ids: IdMap },
    Capture { cgroup: PathBuf, patients: Vec<Patient>, ids: IdMap, sets: Vec<Vec<SemaphoreSet>> },
    ReadLetters { asker: i32, mailboxes: Vec<i32> },
    HideInterruption { cgroup: PathBuf },
}

/// One of the answers to [`Request::Capture`].
#[derive(Debug, Serialize, Deserialize)]
enum Captured {
    /// Processes, encoded as a list; there will be more.
    Some(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The others, or why there are none.
    Rest(Result<Processes, CaptureError>),
}

/// Asks a [`serve`]r, one operation at a time. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Surgeon(Arc<Mutex<UnixStream>>);

impl Surgeon {
    /// With the server at the other end of this socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(Arc::new(Mutex::new(socket))))
    }

    /// Starts the tracking of a process (`userfaultfd(2)`) with this vdso.
    pub fn arm(&self, host: i32, vdso: Vdso) -> Result<Tracking, InjectError> {
        let (reply, descriptor) =
            self.ask::<Result<(), InjectError>>(&Request::Arm { host, vdso })?;
        reply?;
        let descriptor = descriptor.ok_or_else(|| lost(io::ErrorKind::InvalidData.into()))?;
        Tracking::new(descriptor).map_err(|source| call_failed(host, source))
    }

    /// What tells whether the processes of a VE have changed, by their numbers on the host;
    /// nothing where the kernel does not tell. `init` is the first process of the VE.
    pub fn marks(&self, init: i32) -> HashMap<i32, Mark> {
        let Some(fields) = Fields::known().cloned() else { return HashMap::new() };
        let answer = self.ask::<Result<_, CaptureError>>(&Request::Marks { fields, init });
        let marks = answer.map_err(CaptureError::from).and_then(|(marks, _)| marks);
        marks.unwrap_or_else(|error| {
            tracing::info!(%error, "all processes are looked at again");
            HashMap::new()
        })
    }

    /// Makes ready for [`Self::capture`] as long as the processes run: finds out what can only be
    /// told by asking them, so that they need not be asked in the freeze.
    pub fn learn(&self, patients: Vec<Patient>, ids: IdMap) -> Result<(), CaptureError> {
        let Some(fields) = Fields::known().cloned() else { return Ok(()) };
        self.ask::<Result<_, CaptureError>>(&Request::Learn { fields, patients, ids })?.0
    }

    /// Captures frozen processes, with what each does at its end to the semaphores of its IPC
    /// namespace, by whose number they are given. They are frozen again afterwards. While there are
    /// many they are given to `take` as they come, encoded as a list; what is returned are the others.
    pub fn capture(
        &self,
        frozen: &Frozen,
        patients: Vec<Patient>,
        ids: IdMap,
        sets: Vec<Vec<SemaphoreSet>>,
        mut take: impl FnMut(Vec<u8>),
    ) -> Result<Processes, CaptureError> {
        let cgroup = frozen.cgroup().to_owned();
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        send(&mut socket, &Request::Capture { cgroup, patients, ids, sets }, None).map_err(lost)?;
        loop {
            match answer(&mut socket)?.0 {
                Captured::Some(processes) => take(processes),
                Captured::Rest(captured) => return captured,
            }
        }
    }

    /// Fills in the messages of the mailboxes of a frozen VE, which are open here. To read them
    /// they have to be taken out for a moment: a daemon that died then would lose them.
    pub fn read_letters(&self, opened: &[Mailboxes], into: &mut Files) -> Result<(), CaptureError> {
        let mut filled = Vec::new();
        for (namespace, mailboxes) in (0..).zip(opened) {
            for (place, mailbox) in mailboxes.opened.iter().enumerate() {
                if mailbox.holds_letters().map_err(lost)? {
                    filled.push(((namespace, place), mailbox.file.as_raw_fd()));
                }
            }
        }
        if filled.is_empty() {
            return Ok(());
        }
        let asker = std::process::id().cast_signed();
        let mailboxes = filled.iter().map(|(_, fd)| *fd).collect();
        let request = Request::ReadLetters { asker, mailboxes };
        let letters = self.ask::<Result<Vec<Letters>, InjectError>>(&request)?.0?;
        for (((namespace, place), _), letters) in filled.into_iter().zip(letters) {
            let letters = letters.into_iter().map(|(priority, text)| (priority, text.into()));
            let ipc = into.ipc_mut(namespace);
            if let Some(mailbox) = ipc.and_then(|ipc| ipc.mailboxes.get_mut(place)) {
                mailbox.messages = letters.collect();
            }
        }
        Ok(())
    }

    /// Sees to it that programs in a frozen cgroup do not notice the freeze when it ends; see
    /// [`capture::hide_interruption`].
    pub fn hide_interruption(&self, frozen: &Frozen) -> Result<(), CaptureError> {
        let cgroup = frozen.cgroup().to_owned();
        self.ask::<Result<_, CaptureError>>(&Request::HideInterruption { cgroup })?.0
    }

    fn ask<T: DeserializeOwned>(
        &self,
        request: &Request,
    ) -> Result<(T, Option<OwnedFd>), InjectError> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        send(&mut socket, request, None).map_err(lost)?;
        answer(&mut socket)
    }
}

fn answer<T: DeserializeOwned>(
    socket: &mut UnixStream,
) -> Result<(T, Option<OwnedFd>), InjectError> {
    let received = receive(socket).map_err(lost)?;
    received.ok_or_else(|| lost(io::ErrorKind::UnexpectedEof.into()))
}

fn lost(source: io::Error) -> InjectError {
    InjectError::Surgeon { source }
}

/// Whether operations are still wanted, and none under way for as long as the guard is held.
#[derive(Debug, Default)]
pub struct Theatre(Mutex<bool>);

impl Theatre {
    /// Waits for the operation under way and lets none begin afterwards.
    pub fn close(&self) {
        *self.guard() = true;
    }

    fn guard(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Operates until the other end of the socket is closed. Call from one thread: ptrace(2) ties
/// tracees to it.
pub fn serve(mut socket: UnixStream, theatre: &Theatre) -> io::Result<()> {
    let mut view = None;
    while let Some((request, _)) = receive(&mut socket)? {
        let closed = theatre.guard();
        let mut teller = Teller::new(&socket);
        let outcome = match *closed {
            true => refuse(&request),
            false => operate(request, &mut view, &mut teller),
        };
        drop(closed);
        teller.end()?;
        match outcome {
            Outcome::Armed(Ok(descriptor)) => {
                send(&mut socket, &Ok::<(), InjectError>(()), Some(descriptor.as_fd()))?;
            }
            Outcome::Armed(Err(error)) => send(&mut socket, &Err::<(), _>(error), None)?,
            Outcome::Marks(marks) => send(&mut socket, &marks, None)?,
            Outcome::Learned(learned) => send(&mut socket, &learned, None)?,
            Outcome::Captured(captured) => send(&mut socket, &Captured::Rest(captured), None)?,
            Outcome::Letters(letters) => send(&mut socket, &letters, None)?,
            Outcome::Hidden(hidden) => send(&mut socket, &hidden, None)?,
        }
    }
    Ok(())
}

enum Outcome {
    Armed(Result<OwnedFd, InjectError>),
    Marks(Result<HashMap<i32, Mark>, CaptureError>),
    Learned(Result<(), CaptureError>),
    Captured(Result<Processes, CaptureError>),
    Letters(Result<Vec<Letters>, InjectError>),
    Hidden(Result<(), CaptureError>),
}

/// Tells of processes as they are captured, in a thread of its own: an operation under way keeps others
/// from what they do with the VE, and must not wait for one who asked and does not listen.
struct Teller<'a> {
    socket: &'a UnixStream,
    /// There from the first list on.
    started: Option<Telling>,
    /// Whether all could be told.
    told: io::Result<()>,
}

struct Telling {
    lists: Sender<Vec<Process>>,
    thread: JoinHandle<io::Result<()>>,
}

impl<'a> Teller<'a> {
    fn new(socket: &'a UnixStream) -> Self {
        Self { socket, started: None, told: Ok(()) }
    }

    fn tell(&mut self, processes: Vec<Process>) {
        if self.started.is_none() && self.told.is_ok() {
            match self.start() {
                Ok(started) => self.started = Some(started),
                Err(error) => self.told = Err(error),
            }
        }
        if let Some(started) = &self.started {
            // A thread that has ended says why in the end.
            let _ = started.lists.send(processes);
        }
    }

    fn start(&self) -> io::Result<Telling> {
        let mut socket = self.socket.try_clone()?;
        let (lists, coming) = channel::<Vec<Process>>();
        let tell = move || {
            coming.into_iter().try_for_each(|processes| {
                send(&mut socket, &Captured::Some(codec::encode(&processes)), None)
            })
        };
        let thread = std::thread::Builder::new().name("teller".into()).spawn(tell)?;
        Ok(Telling { lists, thread })
    }

    /// Waits until all is told.
    fn end(self) -> io::Result<()> {
        let Some(Telling { lists, thread }) = self.started else { return self.told };
        drop(lists);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn operate(request: Request, view: &mut Option<View>, teller: &mut Teller<'_>) -> Outcome {
    match request {
        Request::Arm { host, vdso } => Outcome::Armed(arm(host, vdso)),
        Request::Marks { fields, init } => {
            Outcome::Marks(ready(fields, init, view).and_then(|view| view.marks()))
        }
        Request::Learn { fields, patients, ids } => {
            Outcome::Learned(learn(fields, &patients, ids, view))
        }
        Request::Capture { cgroup, patients, ids, sets } => {
            let mut take = |processes| teller.tell(processes);
            Outcome::Captured(on_frozen(&cgroup, |frozen| {
                capture::capture(frozen, &patients, ids, &sets, view.as_mut(), &mut take)
            }))
        }
        Request::ReadLetters { asker, mailboxes } => {
            Outcome::Letters(read_letters(asker, &mailboxes).map_err(lost))
        }
        Request::HideInterruption { cgroup } => {
            Outcome::Hidden(on_frozen(&cgroup, capture::hide_interruption))
        }
    }
}

/// The VE is no business of the one who asks any more.
fn refuse(request: &Request) -> Outcome {
    let closed = || lost(io::Error::from_raw_os_error(libc::ECANCELED));
    match request {
        Request::Arm { .. } => Outcome::Armed(Err(closed())),
        Request::Marks { .. } => Outcome::Marks(Err(closed().into())),
        Request::Learn { .. } => Outcome::Learned(Err(closed().into())),
        Request::Capture { .. } => Outcome::Captured(Err(closed().into())),
        Request::ReadLetters { .. } => Outcome::Letters(Err(closed())),
        Request::HideInterruption { .. } => Outcome::Hidden(Err(closed().into())),
    }
}

/// The view of the VE with this first process.
fn ready(fields: Fields, init: i32, view: &mut Option<View>) -> Result<&mut View, CaptureError> {
    let ready = match view.take() {
        Some(ready) => ready,
        None => View::of(fields, init)?,
    };
    Ok(view.insert(ready))
}

/// What cannot be learned now is asked when it is needed.
fn learn(
    fields: Fields,
    patients: &[Patient],
    ids: IdMap,
    view: &mut Option<View>,
) -> Result<(), CaptureError> {
    let Some(init) = patients.iter().find(|patient| patient.inner == 1) else { return Ok(()) };
    ready(fields, init.host, view)?.learn(patients, ids)
}

fn read_letters(asker: i32, mailboxes: &[i32]) -> io::Result<Vec<Letters>> {
    let asker = task::pidfd_open(asker)?;
    mailboxes.iter().map(|&fd| ipc::read_letters(&task::pidfd_getfd(&asker, fd)?)).collect()
}

/// Works on a cgroup that somebody else has frozen, and will let go on.
fn on_frozen<T>(cgroup: &Path, work: impl FnOnce(&Frozen) -> T) -> T {
    let frozen = Frozen::adopt(cgroup);
    let done = work(&frozen);
    frozen.leave();
    done
}

/// Makes a userfaultfd in a process and fetches it.
fn arm(host: i32, vdso: Vdso) -> Result<OwnedFd, InjectError> {
    let mut stopped = Stopped::attach(&[host], ptrace::SUSPEND_SECCOMP)?;
    let Some(thread) = stopped.pop() else { return Err(InjectError::Ended { tid: host }) };
    let made = make_userfault(&thread, host, vdso);
    thread.detach()?;
    aio::prepare(host);
    made
}

fn make_userfault(thread: &Stopped, host: i32, vdso: Vdso) -> Result<OwnedFd, InjectError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | userfault::USER_MODE_ONLY;
    let number = libc::SYS_userfaultfd;
    let fd = thread.checked_call(vdso, "userfaultfd", number, &[flags as u64])?;
    let fetched = task::pidfd_open(host).and_then(|pidfd| task::pidfd_getfd(&pidfd, fd as i32));
    thread.checked_call(vdso, "close", libc::SYS_close, &[fd])?;
    fetched.map_err(|source| call_failed(host, source))
}

fn call_failed(host: i32, source: io::Error) -> InjectError {
    InjectError::Call { call: "userfaultfd".into(), tid: host, source }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::CommandExt,
        process::{Command, Stdio},
    };

    use super::*;
    use crate::{areas::AddressSpace, procfs};

    fn pair(theatre: &Arc<Theatre>) -> (Surgeon, JoinHandle<io::Result<()>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theatre = theatre.clone();
        let server = std::thread::spawn(move || serve(theirs, &theatre));
        (Surgeon::new(ours).unwrap(), server)
    }

    /// A process that says so as soon as it is hurt: by its end.
    struct Sleeper(std::process::Child);

    impl Sleeper {
        fn new() -> Self {
            let mut command = Command::new("sleep");
            command.arg("100").stdin(Stdio::null()).process_group(0);
            Self(command.spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }

        /// Its vdso, once it has executed its program: the name comes first.
        fn vdso(&self) -> Vdso {
            loop {
                let name = procfs::read_text(self.pid(), "comm").unwrap();
                let space = AddressSpace::read(self.pid()).unwrap();
                if let (Some(vdso), "sleep") = (space.vdso(), name.trim()) {
                    return vdso;
                }
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_is_armed_and_runs_on() {
        let mut sleeper = Sleeper::new();
        let (surgeon, server) = pair(&Arc::default());
        surgeon.arm(sleeper.pid(), sleeper.vdso()).unwrap();
        assert!(sleeper.0.try_wait().unwrap().is_none());
        drop(surgeon);
        server.join().unwrap().unwrap();
    }

    #[test]
    fn an_error_comes_back_as_it_was() {
        let (surgeon, _server) = pair(&Arc::default());
        let gone = {
            let sleeper = Sleeper::new();
            sleeper.pid()
        };
        let error = surgeon.arm(gone, Vdso { start: 0, is_32_bit: false }).unwrap_err();
        assert!(matches!(error, InjectError::Ended { tid } if tid == gone), "{error:?}");
    }

    #[test]
    fn an_operation_does_not_wait_for_one_who_does_not_listen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut teller = Teller::new(&theirs);
        let zeros = (0..4096).find_map(|len| codec::decode::<Process>(&vec![0; len]).ok());
        let plain = zeros.expect("zeros are a process");
        // Far more than a socket holds.
        let lists = 200;
        for pid in 0..lists {
            let exe = "x".repeat(10_000);
            teller.tell(vec![Process { pid, exe, ..plain.clone() }]);
        }
        let listening = std::thread::spawn(move || {
            let mut ours = ours;
            let told = |_| match answer::<Captured>(&mut ours).unwrap().0 {
                Captured::Some(list) => codec::decode::<Vec<Process>>(&list).unwrap()[0].pid,
                Captured::Rest(rest) => panic!("{rest:?}"),
            };
            (0..lists).map(told).collect::<Vec<_>>()
        });
        teller.end().unwrap();
        assert_eq!(listening.join().unwrap(), (0..lists).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_begins_in_a_closed_theatre() {
        let sleeper = Sleeper::new();
        let theatre = Arc::default();
        let (surgeon, server) = pair(&theatre);
        theatre.close();
        let error = surgeon.arm(sleeper.pid(), Vdso { start: 0, is_32_bit: false }).unwrap_err();
        assert!(matches!(error, InjectError::Surgeon { .. }), "{error:?}");
        drop(surgeon);
        server.join().unwrap().unwrap();
    }
}
