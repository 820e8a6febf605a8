//! The state of processes as the kernel itself keeps it, read without stopping anything.
//!
//! A program in the kernel (a BPF iterator, Documentation/bpf/bpf_iterators.rst) is shown every task
//! and copies the members of the structures in which its state is kept; where they are, the kernel
//! itself describes ([`Fields`]). One pass over all tasks so takes the place of some hundred calls
//! for each process, and threads that stand still in the freezer need not be stopped once more.
//!
//! A few answers cannot be read off: what the bits in a word of the kernel's own mean, and the
//! instructions of seccomp filters. These are learned: as long as the VE runs, one process with each
//! such word is captured in the other way, by asking it, and whoever has the same word has the same
//! answers. That also proves this way on the running kernel: what it tells of that process must be
//! what the process itself has told. If it is not, nothing is ever read in this way.
//!
//! Everything that only a stop can tell makes a process unusual, and [`super::capture`] stops it:
//! pending signals, timers other than `ITIMER_REAL`, a debugger, job control, tables apart, code of
//! 32 bits.

mod answers;
mod extended;
mod fields;
mod known;
mod program;
mod read;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    sync::{Mutex, PoisonError},
};

use ckpt_format::{
    controls::ThreadControls,
    keys::Keys,
    process::{Process, Thread},
};

pub(crate) use self::fields::Fields;
use self::{
    answers::Answers,
    extended::Form,
    fields::{Field, Possessions},
    known::Known,
    program::{Copier, Namespace},
    read::Record,
};
use super::{CaptureError, IdMap, Take, process, restart, seccomp::Filters, thread};
use crate::{
    container::host_clocks,
    inject::{InjectError, Stopped, restart_interrupted},
    keys, procfs,
    surgeon::{Mark, Patient},
    sys::{event, ptrace},
};

/// How often the tasks are looked at again because one of them was just leaving its processor.
const TRIES: u32 = 20;

/// `struct robust_list_head`, which the kernel knows in one size only.
const ROBUST_LIST_LEN: u64 = 24;

/// So many processes are told before somebody takes them: encoding and sending them goes on beside the
/// telling of the next ones.
const TAKEN_AT_ONCE: usize = 64;

/// How old a thread must be to be asked.
const SETTLED_NS: u64 = 100_000_000;

/// Reads the processes of one VE.
#[derive(Debug)]
pub(crate) struct View {
    fields: Fields,
    copier: Copier,
    namespace: Namespace,
    form: Form,
    known: Known,
    keys: Option<keys::Reader>,
    /// Whether what it told of a process was always what the process itself has told.
    trusted: bool,
}

/// All records of a VE at one moment.
struct Sight {
    bytes: Vec<u8>,
    /// When it was taken: `CLOCK_MONOTONIC`.
    now_ns: i64,
}

impl View {
    /// Of the VE with this process, by its number on the host.
    pub(crate) fn of(fields: Fields, init: i32) -> Result<Self, CaptureError> {
        restart::prepare();
        let failed = |source| InjectError::Control { tid: init, source };
        let copier = Copier::new(&fields, Form::len_max()).map_err(failed)?;
        let sample = {
            let mut stopped = Stopped::attach(&[init], ptrace::SUSPEND_SECCOMP)?;
            let thread = stopped.pop().ok_or(InjectError::Ended { tid: init })?;
            let sample = ptrace::extended_state(thread.tid);
            thread.detach()?;
            sample.map_err(failed)?
        };
        let form = Form::new(sample).ok_or(io::ErrorKind::Unsupported.into()).map_err(failed)?;
        let known = Known::new(&fields, &copier).map_err(failed)?;
        let namespace = Namespace::default();
        let reader = |it: &Possessions| keys::Reader::new(&it.keys, fields.iterator);
        let keys = fields.possessions.as_ref().map(reader).transpose().map_err(failed)?;
        let mut view = Self { fields, copier, namespace, form, known, keys, trusted: true };
        // Its own is the namespace of the VE.
        let bytes = view.copier.copy_of(init, 0).map_err(failed)?;
        let record = view.first(&bytes).ok_or(InjectError::Ended { tid: init })?;
        let depth = record.word(Field::Depth);
        let bytes = view.copier.copy_of(init, depth).map_err(failed)?;
        let record = view.first(&bytes).ok_or(InjectError::Ended { tid: init })?;
        view.namespace = Namespace { address: record.namespace(), depth };
        Ok(view)
    }

    fn first<'a>(&'a self, bytes: &'a [u8]) -> Option<Record<'a>> {
        self.copier.records(bytes).next().map(|bytes| Record::new(self, bytes))
    }

    fn firsts<'a>(&'a self, looks: &'a [Vec<u8>]) -> Vec<Record<'a>> {
        looks.iter().filter_map(|bytes| self.first(bytes)).collect()
    }

    fn records<'a>(&'a self, sight: &'a Sight) -> impl Iterator<Item = Record<'a>> {
        self.copier.records(&sight.bytes).map(|bytes| Record::new(self, bytes))
    }

    fn look(&self) -> io::Result<Sight> {
        let bytes = self.copier.copy(self.namespace)?;
        Ok(Sight { bytes, now_ns: event::elapsed(0, 0)? })
    }

    /// What tells whether a process has changed, by the process; of the dead as well.
    pub(crate) fn marks(&self) -> Result<HashMap<i32, Mark>, CaptureError> {
        if !self.trusted {
            return Ok(HashMap::new());
        }
        let bytes = self.copier.copy_marks(self.namespace);
        let bytes = bytes.map_err(|source| InjectError::Control { tid: 0, source })?;
        let records = self.copier.records(&bytes).map(|bytes| Record::new(self, bytes));
        let leaders = records.filter(|it| it.thread() == it.process());
        Ok(leaders.map(|it| (it.process(), it.mark())).collect())
    }

    /// Asks the processes whose words are not known yet. They run on. If that fails, nothing is
    /// told any more.
    pub(crate) fn learn(&mut self, patients: &[Patient], ids: IdMap) -> Result<(), CaptureError> {
        if !self.trusted {
            return Ok(());
        }
        let learned = self.ask_all(patients, ids);
        self.trusted = learned.is_ok();
        learned
    }

    fn ask_all(&mut self, patients: &[Patient], ids: IdMap) -> Result<(), CaptureError> {
        let failed = |source| InjectError::Control { tid: 0, source };
        let sight = self.look().map_err(failed)?;
        let processes: HashMap<i32, &Patient> = patients.iter().map(|it| (it.host, it)).collect();
        let mut known = std::mem::take(&mut self.known);
        known.settle(self.records(&sight));
        // What has just been born is about to become something else, or to end.
        let now_ns = host_clocks().map_err(failed)?.boottime_ns.unsigned_abs();
        let is_settled =
            |it: &Record<'_>| it.number(Field::Birth).saturating_add(SETTLED_NS) < now_ns;
        let unknown = self.records(&sight).filter(|it| is_settled(it) && known.lacks(it));
        let mut unknown: Vec<i32> = unknown.map(|it| it.process()).collect();
        unknown.dedup();
        let mut learned = Ok(());
        for host in unknown {
            let Some(patient) = processes.get(&host).filter(|it| !is_always_asked(it)) else {
                continue;
            };
            // Another one may have answered for it meanwhile.
            let still = self.records(&sight).any(|it| it.process() == host && known.lacks(&it));
            if !still {
                continue;
            }
            match self.ask(patient, ids, &mut known) {
                // It has ended, does not stop just now, or has become another program meanwhile.
                Err(CaptureError::Proc(error)) if error.is_gone() => {}
                Err(CaptureError::Inject(error)) if error.is_of_one_that_changes() => {}
                other => learned = learned.and(other),
            }
        }
        known.settle(self.records(&sight));
        self.known = known;
        learned
    }

    /// Captures a running process by asking it, and keeps what it says.
    fn ask(&self, patient: &Patient, ids: IdMap, known: &mut Known) -> Result<(), CaptureError> {
        let tids = procfs::threads(patient.host)?;
        // One that waits for a child of vfork(2) or for a disk does not come to a stop; one that a
        // signal has stopped would show ours.
        for &tid in &tids {
            if matches!(procfs::Stat::read(tid)?.state, 'D' | 'T' | 't') {
                return Ok(());
            }
        }
        let mut threads = Stopped::attach(&tids, ptrace::SUSPEND_SECCOMP)?;
        let look = |threads: &[Stopped]| {
            let tids = threads.iter().map(|thread| thread.tid);
            tids.map(|tid| self.copier.copy_of(tid, self.namespace.depth)).collect()
        };
        // Before it is asked, which changes the registers; and afterwards, because it has also left
        // a trace in a word of the kernel's: that somebody has read its memory.
        let seen: io::Result<Vec<_>> = look(&threads);
        let filters = Mutex::default();
        let asked = process::capture(patient, &mut threads, ids, &[], &filters);
        let afterwards: io::Result<Vec<_>> = look(&threads);
        // All of them, whatever becomes of one.
        threads.into_iter().map(Stopped::detach).fold(Ok(()), Result::and)?;
        let asked = asked?;
        let filters = filters.into_inner().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| InjectError::Control { tid: patient.host, source };
        let (seen, afterwards) = (seen.map_err(failed)?, afterwards.map_err(failed)?);
        let filters = filters.into_list();
        let (seen, afterwards) = (self.firsts(&seen), self.firsts(&afterwards));
        known.keep(&asked, &seen, &filters);
        known.keep(&asked, &afterwards, &filters);
        let mut again = Filters::default();
        let now_ns = asked.timers_read_at_ns;
        // Only a stop tells what is unusual; and by it the dispatch of calls is off, so that such a
        // thread looks like others.
        let dispatches = |thread: &Thread| thread.controls.dispatch.is_some();
        if seen.len() != asked.threads.len() || asked.threads.iter().any(dispatches) {
            return Ok(());
        }
        let told = self.process(
            patient,
            &seen,
            now_ns,
            ids,
            known,
            (&mut again, &mut Answers::default()),
        )?;
        match told {
            Some(told) if !known::agree(&asked, &told) => {
                tracing::warn!(
                    pid = patient.inner,
                    differs = known::difference(&asked, &told),
                    "the kernel's structures are not understood"
                );
                Err(InjectError::Control {
                    tid: patient.host,
                    source: io::ErrorKind::Unsupported.into(),
                }
                .into())
            }
            _ => Ok(()),
        }
    }

    /// The state of these processes of a frozen VE, as far as it can be told without stopping
    /// them; and the last number that a process of the VE got. `semaphores` says whether there are
    /// any that the end of a process may change.
    pub(super) fn tell(
        &mut self,
        patients: &[Patient],
        ids: IdMap,
        semaphores: bool,
        (filters, told): (&mut Filters, &mut Told),
        take: &mut Take<'_>,
    ) -> Result<(), CaptureError> {
        if !self.trusted {
            return Ok(());
        }
        let failed = |source| InjectError::Control { tid: 0, source };
        let hosts: HashSet<i32> = patients.iter().map(|patient| patient.host).collect();
        let mut sight = self.look().map_err(failed)?;
        for _ in 0..TRIES {
            let ours = |it: &Record<'_>| hosts.contains(&it.process());
            if !self.records(&sight).filter(ours).any(|it| it.is_running()) {
                break;
            }
            std::thread::yield_now();
            sight = self.look().map_err(failed)?;
        }
        let mut known = std::mem::take(&mut self.known);
        known.settle(self.records(&sight));
        let mut threads: BTreeMap<i32, Vec<Record<'_>>> = BTreeMap::new();
        for record in self.records(&sight) {
            threads.entry(record.process()).or_default().push(record);
        }
        let mut answers = Answers::default();
        for patient in patients {
            let Some(records) = threads.get_mut(&patient.host) else { continue };
            // The leader first, as `procfs::threads` has them.
            records.sort_by_key(|it| (it.thread() != patient.host, it.thread()));
            let ending = records.iter().any(|it| it.is_ending(sight.now_ns.unsigned_abs()));
            let leader = records[0];
            let undo = semaphores && records.iter().any(|it| it.changes_semaphores());
            let unusual = records.iter().any(|it| it.is_unusual(&leader));
            if is_always_asked(patient) || ending || undo || unusual {
                continue;
            }
            if patient.inner == 1 {
                told.last_pid = Some(leader.last_number());
            }
            let (now_ns, kept) = (sight.now_ns, (&mut *filters, &mut answers));
            let process = self.process(patient, records, now_ns, ids, &known, kept)?;
            if let Some(process) = process {
                told.hosts.insert(patient.host);
                told.rest.push(process);
            }
            if told.rest.len() == TAKEN_AT_ONCE {
                take(std::mem::take(&mut told.rest));
            }
        }
        drop(threads);
        self.known = known;
        told.possessions = self.records(&sight).filter_map(|it| it.possessions()).collect();
        Ok(())
    }

    /// The keys of all who are in the user namespace of the VE itself; `None` where they cannot be
    /// read.
    pub(super) fn keys(&self, told: &Told, ids: IdMap) -> Result<Option<Keys>, CaptureError> {
        let Some(reader) = &self.keys else { return Ok(None) };
        let init = told.possessions.iter().find(|(holder, _)| holder.tid == 1);
        let Some((_, users)) = init else { return Ok(None) };
        let of_it = told.possessions.iter().filter(|(_, theirs)| theirs == users);
        reader.keys(&of_it.map(|(holder, _)| *holder).collect::<Vec<_>>(), *users, ids).map(Some)
    }

    /// One process by the records of its threads; `None` if something in them is not known.
    fn process(
        &self,
        patient: &Patient,
        records: &[Record<'_>],
        now_ns: i64,
        ids: IdMap,
        known: &Known,
        (filters, answers): (&mut Filters, &mut Answers),
    ) -> Result<Option<Process>, CaptureError> {
        let Some(leader) = records.first() else { return Ok(None) };
        let Some(memory) = known.memory(leader) else { return Ok(None) };
        let Some(membarrier) = known.barriers(leader) else { return Ok(None) };
        let mut threads = Vec::with_capacity(records.len());
        for record in records {
            let Some(thread) = self.thread(record, ids, known, (filters, answers))? else {
                return Ok(None);
            };
            threads.push(thread);
        }
        let program = answers.program(leader)?;
        let is_founder = threads.first().is_some_and(|leader| leader.below.last() == Some(&1));
        Ok(Some(Process {
            pid: patient.inner,
            memory: leader.memory(),
            exe_object: program.object,
            exe: program.path,
            cwd: answers.directory(leader, Field::WorkingDirectory, "cwd")?,
            root: answers.directory(leader, Field::RootDirectory, "root")?,
            umask: leader.word(Field::Umask),
            actions: leader.actions(),
            pending: Vec::new(),
            interval_timers: [
                leader.real_timer(now_ns.unsigned_abs()),
                Default::default(),
                Default::default(),
            ],
            posix_timers: Vec::new(),
            timers_read_at_ns: now_ns,
            limits: leader.limits(),
            descriptors: Vec::new(),
            child_subreaper: leader.is_subreaper(),
            oom_score_adjustment: leader.out_of_memory(),
            login: leader.login(ids),
            coredump_filter: memory.coredump_filter,
            dumpable: memory.dumpable,
            controls: memory.controls,
            membarrier,
            personality: leader.word(Field::Personality),
            stopped: None,
            semaphore_undo: Vec::new(),
            rings: Vec::new(),
            last_pid: if is_founder { leader.last_number() } else { 0 },
            local_segments: Vec::new(),
            ended: None,
            threads,
        }))
    }

    fn thread(
        &self,
        record: &Record<'_>,
        ids: IdMap,
        known: &Known,
        (filters, answers): (&mut Filters, &mut Answers),
    ) -> Result<Option<Thread>, CaptureError> {
        let host = record.process();
        let Some(controls) = known.controls(record) else { return Ok(None) };
        let Some(own_filters) = known.filters(record, filters) else { return Ok(None) };
        let Some(numbers) = record.numbers() else { return Ok(None) };
        let Some(extended) = self.form.standard(record.extended(), record.keys()) else {
            return Ok(None);
        };
        let extended = thread::without_zeros(extended);
        let mut registers = record.registers();
        let rseq = record.rseq();
        // In a call it is in no such section.
        if let Some(rseq) = &rseq
            && registers.orig_rax.cast_signed() < 0
        {
            thread::abort_critical_section(host, &mut registers, rseq.pointer);
        }
        let stack_pointer = registers.rsp;
        restart_interrupted(&mut registers);
        restart::again(host, &mut registers, || Some(record.number(Field::RestartFunction)));
        Ok(Some(Thread {
            tid: numbers[0],
            below: numbers[1..].to_vec(),
            name: record.name(),
            registers: ptrace::registers_to_bytes(&registers),
            extended,
            signal_mask: record.signal_mask(),
            pending: Vec::new(),
            alternate_stack: record.alternate_stack(stack_pointer),
            tid_address: record.number(Field::ClearTid),
            robust_list: (record.number(Field::RobustList), ROBUST_LIST_LEN),
            rseq,
            credentials: record.credentials(ids),
            scheduling: answers.scheduling(record)?,
            parent_death_signal: record.word(Field::DeathSignal).cast_signed(),
            timer_slack_ns: record.number(Field::TimerSlack),
            filters: own_filters,
            directories: None,
            segments: Vec::new(),
            controls: ThreadControls { dispatch: None, ..controls },
        }))
    }
}

/// Whether a process is of a kind that only a stop tells enough of.
fn is_always_asked(patient: &Patient) -> bool {
    patient.rings || patient.vdso.is_some_and(|vdso| vdso.is_32_bit)
}

/// What could be told without stopping anything.
#[derive(Default)]
pub(crate) struct Told {
    /// Who, by their numbers on the host.
    pub(crate) hosts: HashSet<i32>,
    /// Those of them that nobody has taken yet.
    pub(crate) rest: Vec<Process>,
    pub(crate) last_pid: Option<i32>,
    /// The keyrings of threads, each with the namespace of its user.
    possessions: Vec<(keys::Holder, u64)>,
}

#[cfg(test)]
mod tests;
