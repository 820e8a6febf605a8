//! From a record of the kernel to the state of a thread and of a process.

use ckpt_format::{
    memory::MemoryMap,
    process::{Credentials, IntervalTimer, Rseq, SignalAction},
};

use super::{
    View,
    fields::{DEPTH_MAX, Field, GROUPS_MAX, NUMBERS_AT, Place, REGISTERS_AT, REGISTERS_LEN},
};
use crate::{
    capture::{IdMap, thread::has_segments},
    keys::Holder,
    surgeon::{AreasMark, KinMark, Mark},
    sys::ptrace::Registers,
};

/// What the kernel keeps about one thread.
#[derive(Clone, Copy)]
pub(super) struct Record<'a> {
    view: &'a View,
    bytes: &'a [u8],
}

/// `jobctl` while a thread stands in the trap of the freezer (`JOBCTL_TRAP_FREEZE`). What a tracer
/// leaves (`JOBCTL_STOP_DEQUEUED`) means something on the way to another stop only.
const FREEZER: u64 = 1 << 23 | 1 << 16;
/// `signal->flags` of the first process of a pid namespace (`SIGNAL_UNKILLABLE`).
const UNKILLABLE: u32 = 0x40;
/// How near to now a timer that is not armed may have ended for its signal to be under way.
const UNDER_WAY_NS: u64 = 10_000_000;

impl<'a> Record<'a> {
    pub(super) fn new(view: &'a View, bytes: &'a [u8]) -> Self {
        Self { view, bytes }
    }

    fn at(&self, place: &Place) -> &'a [u8] {
        &self.bytes[place.at as usize..][..place.len as usize]
    }

    pub(super) fn bytes(&self, field: Field) -> &'a [u8] {
        self.at(self.view.fields.place(field))
    }

    pub(super) fn number(&self, field: Field) -> u64 {
        number(self.bytes(field))
    }

    pub(super) fn word(&self, field: Field) -> u32 {
        self.number(field) as u32
    }

    fn int(&self, field: Field) -> i32 {
        self.word(field).cast_signed()
    }

    fn bit(&self, bit: &super::fields::Bit) -> bool {
        self.at(&bit.place)[0] & bit.mask != 0
    }

    /// The process, as numbered on the host.
    pub(super) fn process(&self) -> i32 {
        self.int(Field::Process)
    }

    /// The thread, as numbered on the host.
    pub(super) fn thread(&self) -> i32 {
        self.int(Field::Thread)
    }

    /// The address of the pid namespace that was asked for.
    pub(super) fn namespace(&self) -> u64 {
        number(&self.bytes[..8])
    }

    /// Everything that the answers about its scheduling come from; `None` for policies with more to
    /// them.
    pub(super) fn scheduling(&self) -> Option<Vec<u8>> {
        let plain = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        let words = [
            Field::Policy,
            Field::StaticPriority,
            Field::RealTimePriority,
            Field::IoContextPointer,
            Field::IoPriority,
        ];
        let (resets, processors) = (&self.view.fields.resets, &self.view.fields.processors);
        let mut all = vec![u8::from(self.bit(resets)), u8::from(self.number(words[3]) != 0)];
        for field in words.into_iter().filter(|field| *field != Field::IoContextPointer) {
            all.extend(self.bytes(field));
        }
        all.extend(self.at(processors));
        plain.contains(&self.int(Field::Policy)).then_some(all)
    }

    /// Whether it is running just now, so that its registers are not kept.
    pub(super) fn is_running(&self) -> bool {
        self.number(Field::OnProcessor) != 0
    }

    /// Its numbers from the namespace of the VE on.
    pub(super) fn numbers(&self) -> Option<Vec<i32>> {
        let depth = self.word(Field::Depth).checked_sub(self.view.namespace.depth)?;
        let number = |index: u32| {
            let at = (NUMBERS_AT + 16 * index) as usize;
            number(&self.bytes[at..at + 4]) as i32
        };
        (depth < DEPTH_MAX).then(|| (0..=depth).map(number).collect())
    }

    /// Whether anything about the thread can only be told by stopping or asking it.
    pub(super) fn is_unusual(&self, leader: &Record<'_>) -> bool {
        let zero = |field: Field| self.bytes(field).iter().all(|byte| *byte == 0);
        let same = |field: Field| self.bytes(field) == leader.bytes(field);
        let plain = [
            Field::ExitState,
            Field::Tracer,
            Field::OnProcessor,
            Field::Pending,
            Field::Dispatch,
            Field::PendingOfAll,
            Field::PosixTimers,
            Field::ProcessorTimers,
            Field::FutureFlags,
        ];
        let common = [Field::FileTable, Field::DirectoriesPointer, Field::MemoryPointer];
        let registers = self.registers();
        // Still in a call whose answer is not there: it waits for a child of vfork(2), not in the
        // trap of the freezer.
        let inside = registers.orig_rax.cast_signed() >= 0
            && registers.rax.cast_signed() == -i64::from(libc::ENOSYS);
        !plain.into_iter().all(zero)
            || !common.into_iter().all(same)
            || zero(Field::MemoryPointer)
            || zero(Field::FileTable)
            || self.number(Field::JobControl) & !FREEZER != 0
            || self.word(Field::SignalFlags) & !UNKILLABLE != 0
            || self.word(Field::GroupCount) > GROUPS_MAX
            || inside
            || has_segments(&registers)
    }

    /// Whether its end may change semaphores (`SEM_UNDO`). Threads always have a list for that.
    pub(super) fn changes_semaphores(&self) -> bool {
        self.number(Field::SemaphoreUndo) != 0
    }

    /// Whether the end of the timer of the process may be under way, as a signal.
    pub(super) fn is_ending(&self, now_ns: u64) -> bool {
        let ended = self.number(Field::RealTimer);
        self.number(Field::RealTimerState) == 0
            && ended != 0
            && ended.abs_diff(now_ns) < UNDER_WAY_NS
    }

    pub(super) fn registers(&self) -> Registers {
        let at = REGISTERS_AT as usize;
        let mut words = self.bytes[at..at + REGISTERS_LEN as usize].chunks_exact(8).map(number);
        let mut next = || words.next().unwrap_or(0);
        Registers {
            r15: next(),
            r14: next(),
            r13: next(),
            r12: next(),
            rbp: next(),
            rbx: next(),
            r11: next(),
            r10: next(),
            r9: next(),
            r8: next(),
            rax: next(),
            rcx: next(),
            rdx: next(),
            rsi: next(),
            rdi: next(),
            orig_rax: next(),
            rip: next(),
            // What is above is the kernel's own.
            cs: next() & 0xffff,
            eflags: next(),
            rsp: next(),
            ss: next() & 0xffff,
            fs_base: self.number(Field::BaseFs),
            gs_base: self.number(Field::BaseGs),
            ds: self.number(Field::SegmentDs),
            es: self.number(Field::SegmentEs),
            fs: self.number(Field::SegmentFs),
            gs: self.number(Field::SegmentGs),
        }
    }

    /// The extended registers as the kernel keeps them.
    pub(super) fn extended(&self) -> &'a [u8] {
        &self.bytes[self.view.fields.len as usize..]
    }

    pub(super) fn keys(&self) -> Option<u32> {
        self.view.fields.keys.as_ref().map(|place| number(self.at(place)) as u32)
    }

    pub(super) fn signal_mask(&self) -> u64 {
        match self.bit(&self.view.fields.restores_mask) {
            true => self.number(Field::SavedMask),
            false => self.number(Field::Blocked),
        }
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.bytes(Field::Name);
        name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
    }

    /// As sigaltstack(2) tells: address, flags, size.
    pub(super) fn alternate_stack(&self, stack_pointer: u64) -> (u64, u32, u64) {
        const AUTO_DISARM: u32 = 1 << 31;
        let (start, size) = (self.number(Field::StackAddress), self.number(Field::StackSize));
        let kept = self.word(Field::StackFlags) & AUTO_DISARM;
        let below = stack_pointer.wrapping_sub(start);
        let flags = match size {
            0 => libc::SS_DISABLE.cast_unsigned(),
            _ if kept == 0 && stack_pointer > start && below <= size => {
                libc::SS_ONSTACK.cast_unsigned()
            }
            _ => 0,
        };
        (start, flags | kept, size)
    }

    pub(super) fn rseq(&self) -> Option<Rseq> {
        let pointer = self.number(Field::RseqPointer);
        (pointer != 0).then(|| Rseq {
            pointer,
            size: self.word(Field::RseqSize),
            signature: self.word(Field::RseqSignature),
        })
    }

    pub(super) fn credentials(&self, ids: IdMap) -> Credentials {
        let inside = |bytes: &[u8]| ids.inside(number(bytes));
        let ids: Vec<u32> = self.bytes(Field::Users).chunks_exact(4).map(inside).collect();
        let four = |first: usize| [0, 4, 2, 6].map(|place| ids[first + place]);
        let count = self.word(Field::GroupCount).min(GROUPS_MAX) as usize;
        Credentials {
            users: four(0),
            groups: four(1),
            supplementary: self
                .bytes(Field::GroupList)
                .chunks_exact(4)
                .take(count)
                .map(inside)
                .collect(),
            capabilities: [
                Field::Inheritable,
                Field::Permitted,
                Field::Effective,
                Field::Bounding,
                Field::Ambient,
            ]
            .map(|field| self.number(field)),
            secure_bits: self.word(Field::SecureBits),
            no_new_privileges: self.number(Field::AtomicFlags) & 1 != 0,
        }
    }

    pub(super) fn memory(&self) -> MemoryMap {
        let auxiliary = self.bytes(Field::Auxiliary);
        let pairs = auxiliary.chunks_exact(16);
        // Up to the pair that ends it.
        let count = pairs.clone().position(|pair| number(&pair[..8]) == 0);
        let len = count.map_or(auxiliary.len(), |count| 16 * (count + 1));
        MemoryMap {
            start_code: self.number(Field::StartCode),
            end_code: self.number(Field::EndCode),
            start_data: self.number(Field::StartData),
            end_data: self.number(Field::EndData),
            start_brk: self.number(Field::StartBreak),
            brk: self.number(Field::Break),
            start_stack: self.number(Field::StartStack),
            arg_start: self.number(Field::ArgumentStart),
            arg_end: self.number(Field::ArgumentEnd),
            env_start: self.number(Field::EnvironmentStart),
            env_end: self.number(Field::EnvironmentEnd),
            auxv: auxiliary[..len].to_vec(),
        }
    }

    pub(super) fn actions(&self) -> Vec<SignalAction> {
        /// By which the kernel remembers what kind of program has installed it.
        const OF_THE_KERNEL: u64 = 0x0300_0000;
        let action = |bytes: &[u8]| SignalAction {
            handler: number(&bytes[..8]),
            flags: number(&bytes[8..16]) & !OF_THE_KERNEL,
            restorer: number(&bytes[16..24]),
            mask: number(&bytes[24..32]),
        };
        self.bytes(Field::Actions).chunks_exact(32).map(action).collect()
    }

    /// `ITIMER_REAL`.
    pub(super) fn real_timer(&self, now_ns: u64) -> IntervalTimer {
        let armed = self.number(Field::RealTimerState) != 0;
        let left = self.number(Field::RealTimer).saturating_sub(now_ns) / 1000;
        IntervalTimer {
            value_us: if armed { left.max(1) } else { 0 },
            interval_us: self.number(Field::RealTimerPeriod) / 1000,
        }
    }

    pub(super) fn limits(&self) -> Vec<(u64, u64)> {
        let pair = |bytes: &[u8]| (number(&bytes[..8]), number(&bytes[8..]));
        self.bytes(Field::Limits).chunks_exact(16).map(pair).collect()
    }

    pub(super) fn is_subreaper(&self) -> bool {
        self.bit(&self.view.fields.subreaper)
    }

    pub(super) fn out_of_memory(&self) -> i32 {
        i32::from(self.number(Field::OutOfMemory) as i16)
    }

    /// What tells whether anything that is listed of the process has changed.
    pub(super) fn mark(&self) -> Mark {
        let kin = KinMark {
            born_ns: self.number(Field::Birth),
            dead: self.word(Field::ExitState) != 0,
            exit_signal: self.int(Field::ExitSignal),
            parent: self.int(Field::ParentNumber),
            group: self.int(Field::GroupNumber),
            session: self.int(Field::SessionNumber),
            descriptors: self.number(Field::FileTable),
            directories: self.number(Field::DirectoriesPointer),
        };
        let mut places = [self.number(Field::UserNamespace); 9];
        for (place, pointer) in
            places[1..].iter_mut().zip(self.bytes(Field::Namespaces).chunks_exact(8))
        {
            *place = number(pointer);
        }
        Mark { kin, areas: self.areas_mark(), places }
    }

    /// What tells whether its areas have changed; none for one that has no memory any more.
    fn areas_mark(&self) -> Option<AreasMark> {
        let memory = self.number(Field::MemoryPointer);
        // Four bytes.
        let locked = number(self.at(self.view.fields.locked.as_ref()?)) as u32;
        (memory != 0).then(|| AreasMark { memory, locked, executed: self.word(Field::Executed) })
    }

    /// Who has logged in.
    pub(super) fn login(&self, ids: IdMap) -> Option<u32> {
        let login = number(self.at(self.view.fields.login.as_ref()?));
        (login != u64::from(u32::MAX)).then(|| ids.inside(login))
    }

    /// Where its keyrings are, and the namespace of its user; nothing for one that has ended.
    pub(super) fn possessions(&self) -> Option<(Holder, u64)> {
        let places = &self.view.fields.possessions.as_ref()?.places;
        let [session, process, thread, users] = places.each_ref().map(|it| number(self.at(it)));
        let tid = *self.numbers()?.first()?;
        let lives = self.number(Field::MemoryPointer) != 0;
        lives.then_some((Holder { tid, session, process, thread }, users))
    }

    /// `ns_last_pid` of the VE.
    pub(super) fn last_number(&self) -> i32 {
        self.int(Field::NextNumber).saturating_sub(1)
    }
}

/// Up to eight bytes, little-endian.
fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}
