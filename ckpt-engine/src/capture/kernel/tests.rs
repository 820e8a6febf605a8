//! Both ways to capture a process of our own must tell the same.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::*;
use crate::{areas::AddressSpace, capture::process, freeze::Frozen, sys::program::keys};

const IDS: IdMap = IdMap { base: 0, count: u32::MAX };

/// A process that sleeps, in a cgroup of its own.
struct Sleeper {
    child: Child,
    cgroup: PathBuf,
    frozen: Option<Frozen>,
    born: Instant,
}

impl Sleeper {
    fn new(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        let child = command.args(arguments).stdin(Stdio::null()).spawn().unwrap();
        let cgroup = own_cgroup().join(format!("kernel-test-{}", child.id()));
        fs::create_dir(&cgroup).unwrap();
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
        Self { child, cgroup, frozen: None, born: Instant::now() }
    }

    /// Once it is in the call that it waits in.
    fn patient(&self) -> Patient {
        let host = self.child.id().cast_signed();
        loop {
            // The name comes first when a program is executed.
            let executed = procfs::read_text(host, "comm").unwrap().trim() == "sleep";
            let space = AddressSpace::read(host).unwrap();
            let stat = procfs::Stat::read(host).unwrap();
            let settled = self.born.elapsed() > Duration::from_millis(200);
            if let (Some(vdso), 'S', true, true) = (space.vdso(), stat.state, executed, settled) {
                return Patient {
                    host,
                    ended: None,
                    inner: 1,
                    vdso: Some(vdso),
                    ipc: 0,
                    rings: false,
                };
            }
        }
    }

    fn freeze(&mut self) {
        // A thread that has just been let go, and has not run since, still counts as stopped.
        while !matches!(procfs::Stat::read(self.child.id().cast_signed()).unwrap().state, 'S' | 'T')
        {
            std::thread::yield_now();
        }
        self.frozen = Some(Frozen::freeze(&self.cgroup).unwrap());
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.frozen = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// The cgroup (v2) that the tests are in.
fn own_cgroup() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
    let top = mount.split_whitespace().nth(4).unwrap();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    Path::new(top).join(own)
}

fn view(patient: &Patient) -> View {
    View::of(Fields::known().expect("a kernel with BTF").clone(), patient.host).unwrap()
}

/// What is told of it, if anything is.
fn tell(view: &mut View, patient: Patient) -> Told {
    let mut told = Told::default();
    let into = (&mut Filters::default(), &mut told);
    view.tell(&[patient], IDS, false, into, &mut |_| panic!("they are few")).unwrap();
    told
}

/// As it is told by the kernel, and by itself when it is stopped.
fn both_ways(view: &mut View, patient: &Patient) -> (Process, Process) {
    let told = tell(view, *patient).rest.pop().expect("nothing unusual");
    let mut threads = Stopped::attach(&[patient.host], ptrace::SUSPEND_SECCOMP).unwrap();
    assert_eq!(told.threads[0].signal_mask, threads[0].mask);
    let mut extended = told.threads[0].extended.clone();
    let asked = ptrace::extended_state(patient.host).unwrap();
    extended.resize(asked.len(), 0);
    assert_eq!(extended, asked);
    // Its code of ours runs only when the cgroup lets it.
    let cgroup = own_cgroup().join(format!("kernel-test-{}", patient.host));
    fs::write(cgroup.join("cgroup.freeze"), "0").unwrap();
    let captured = process::capture(patient, &mut threads, IDS, &[], &Mutex::default());
    fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
    for thread in threads {
        thread.detach().unwrap();
    }
    (told, captured.unwrap())
}

#[test]
fn what_the_kernel_keeps_is_what_a_stopped_process_says() {
    let mut sleeper = Sleeper::new("nice", &["-n", "5", "sleep", "100"]);
    let patient = sleeper.patient();
    let mut view = view(&patient);
    view.learn(&[patient], IDS).unwrap();
    sleeper.freeze();
    let (told, asked) = both_ways(&mut view, &patient);
    assert!(known::agree(&asked, &told), "{}", known::difference(&asked, &told));
    assert_eq!(told.threads[0].scheduling.nice, 5);
    assert_eq!(told.threads[0].name, b"sleep");
    assert!(!told.memory.auxv.is_empty());
}

#[test]
fn a_process_that_was_not_asked_is_told_by_what_another_one_said() {
    let (first, mut second) = (Sleeper::new("sleep", &["100"]), Sleeper::new("sleep", &["101"]));
    let (first, patient) = (first.patient(), second.patient());
    let mut view = view(&first);
    view.learn(&[first], IDS).unwrap();
    second.freeze();
    let (told, asked) = both_ways(&mut view, &patient);
    assert!(known::agree(&asked, &told), "{}", known::difference(&asked, &told));
}

#[test]
fn a_stopped_process_must_be_asked() {
    let mut sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let mut view = view(&patient);
    view.learn(&[patient], IDS).unwrap();
    let pid = nix::unistd::Pid::from_raw(patient.host);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    while procfs::Stat::read(patient.host).unwrap().state != 'T' {
        std::thread::yield_now();
    }
    sleeper.freeze();
    let told = tell(&mut view, patient);
    assert!(told.rest.is_empty());
}

#[test]
fn nothing_is_told_of_words_that_nobody_has_explained() {
    let mut sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let mut view = view(&patient);
    sleeper.freeze();
    let told = tell(&mut view, patient);
    assert!(told.rest.is_empty());
}

#[test]
fn a_change_of_areas_that_maps_does_not_show_is_noticed() {
    let sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let view = view(&patient);
    let mark = || view.marks().unwrap()[&patient.host].areas.unwrap();
    let maps = || procfs::read_text(patient.host, "maps").unwrap();
    let (before, shown) = (mark(), maps());
    assert_eq!(mark(), before, "nothing has happened");
    let space = AddressSpace::read(patient.host).unwrap();
    let area = space.areas.iter().find(|area| area.grows_down).unwrap();
    let thread = Stopped::attach(&[patient.host], 0).unwrap().pop().unwrap();
    let advice = [area.start, area.len(), libc::MADV_DONTDUMP as u64];
    assert_eq!(thread.call(patient.vdso.unwrap(), libc::SYS_madvise, &advice).unwrap(), 0);
    thread.detach().unwrap();
    assert_eq!(maps(), shown);
    assert_ne!(mark(), before);
}

#[test]
fn a_mark_says_what_proc_says_of_a_process() {
    let mut sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let view = view(&patient);
    let told = |field: usize| {
        procfs::Stat::read(patient.host).unwrap().field::<i32>(field, "a relation").unwrap()
    };
    let mark = view.marks().unwrap()[&patient.host].kin;
    assert_eq!((mark.parent, mark.group, mark.session), (told(4), told(5), told(6)));
    assert_eq!((mark.exit_signal, mark.dead), (told(38), false));
    assert_eq!(view.marks().unwrap()[&patient.host].kin, mark, "nothing has happened");
    sleeper.child.kill().unwrap();
    while procfs::Stat::read(patient.host).unwrap().state != 'Z' {
        std::thread::yield_now();
    }
    let dead = view.marks().unwrap()[&patient.host];
    assert!(dead.kin.dead && dead.areas.is_none());
}

#[test]
fn a_kernel_whose_structures_are_others_is_not_trusted() {
    let mut sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let mut fields = Fields::known().expect("a kernel with BTF").clone();
    // As if the limits were one further on.
    fields.places[Field::Limits as usize].offset += 16;
    let mut view = View::of(fields, patient.host).unwrap();
    assert!(!view.marks().unwrap().is_empty(), "nothing is wrong yet");
    view.learn(&[patient], IDS).unwrap_err();
    assert!(view.marks().unwrap().is_empty());
    view.learn(&[patient], IDS).expect("nobody is asked again");
    sleeper.freeze();
    let told = tell(&mut view, patient);
    assert!(told.rest.is_empty());
}

#[test]
fn keys_are_read_from_the_kernels_own_records() {
    // The session keyring of this thread, which the child inherits.
    keys::join_session(None).unwrap();
    keys::add(c"user", c"long", &[5; 3000], keys::OF_SESSION).unwrap();
    keys::add(c"logon", c"test:secret", b"not for readers", keys::OF_SESSION).unwrap();
    let inner = keys::add(c"keyring", c"inner", b"", keys::OF_SESSION).unwrap();
    for number in 0..60u8 {
        let name = std::ffi::CString::new(format!("number {number}")).unwrap();
        keys::add(c"user", &name, &[number], inner).unwrap();
    }
    keys::set_permissions(inner, 0x3f03_0000).unwrap();
    let mut sleeper = Sleeper::new("sleep", &["100"]);
    let patient = sleeper.patient();
    let mut view = view(&patient);
    view.learn(&[patient], IDS).unwrap();
    sleeper.freeze();
    let told = tell(&mut view, patient);
    let (holder, users) =
        told.possessions.iter().find(|(holder, _)| holder.tid == patient.host).unwrap();
    let found = view.keys.as_ref().unwrap().keys(&[*holder], *users, IDS).unwrap();
    let key = |place: &u32| &found.keys[*place as usize];
    let session = found.threads[&patient.host].session.unwrap();
    let held: Vec<_> = key(&session).links.iter().map(key).collect();
    let named = |name: &[u8]| held.iter().find(|key| key.description == name).unwrap();
    assert_eq!((named(b"long").kind.as_str(), &*named(b"long").payload), ("user", &[5; 3000][..]));
    assert_eq!(named(b"test:secret").payload, b"not for readers");
    assert_eq!((named(b"inner").permissions, named(b"inner").expires_s), (0x3f03_0000, 0));
    let mut numbers: Vec<_> =
        named(b"inner").links.iter().map(|it| key(it).payload.clone()).collect();
    numbers.sort();
    assert_eq!(numbers, (0..60).map(|number| vec![number]).collect::<Vec<_>>());
}

#[test]
fn whoever_is_in_another_namespace_has_another_mark() {
    let first = Sleeper::new("sleep", &["100"]);
    let first = first.patient();
    let view = view(&first);
    // In the order of `struct nsproxy`, behind that of its users.
    let kinds: [(&str, &[usize]); 9] = [
        ("--user", &[0]),
        ("--uts", &[1]),
        ("--ipc", &[2]),
        ("--mount", &[3]),
        ("--pid", &[4]),
        ("--net", &[5]),
        // That of its children, which is its own from its next program on.
        ("--time", &[6, 7]),
        ("--cgroup", &[8]),
        ("--propagation=unchanged", &[]),
    ];
    for (kind, places) in kinds {
        let sleeper = Sleeper::new("unshare", &[kind, "sleep", "100"]);
        let patient = sleeper.patient();
        let [own, other] = [first, patient].map(|it| view.marks().unwrap()[&it.host].places);
        let differ: Vec<usize> = (0..own.len()).filter(|&at| own[at] != other[at]).collect();
        assert_eq!(differ, places, "{kind}");
        assert!(own.iter().all(|place| *place != 0));
    }
}
