//! The program that is shown all tasks and copies what is known of those of one VE.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::fields::{
    Base, DEPTH_MAX, EXTENDED_LEN_AT, Fields, NUMBERS_AT, POINTERS, REGISTERS_AT, REGISTERS_LEN,
};
use crate::sys::bpf::{
    self, MapKind,
    code::{
        ADD, ADD_REGISTER, COPY, Code, EXIT, IF_AT_MOST, IF_EQUAL, IF_SAME, LOAD, LOAD_WORD, SET,
        SHIFT_LEFT, STORE, STORE_REGISTER, helper,
    },
};

/// The pid namespace whose tasks are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    /// Its address in the kernel; 0 for any.
    pub(super) address: u64,
    /// How many namespaces it is below the first one.
    pub(super) depth: u32,
}

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Copier {
    question: OwnedFd,
    program: OwnedFd,
    /// The length of a record without extended registers, and the most that these can have.
    len: (u32, u32),
}

/// A question: the address of the namespace, where the numbers from it on are, and whether to leave
/// out the extended registers.
const QUESTION: usize = 24;

impl Copier {
    /// `extended` is how many bytes extended registers have at most.
    pub(super) fn new(fields: &Fields, extended: u32) -> io::Result<Self> {
        let question = bpf::map(MapKind::Array, QUESTION as u32)?;
        let room = bpf::map(MapKind::Array, fields.len + extended.next_multiple_of(8))?;
        let program = program(question.as_fd(), room.as_fd(), fields, extended);
        let program = bpf::load_for_tasks(&program, fields.iterator)?;
        Ok(Self { question, program, len: (fields.len, extended) })
    }

    /// The records in what was copied, each as long as its extended registers make it.
    pub(super) fn records<'a>(
        &self,
        mut bytes: &'a [u8],
    ) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (len, extended_max) = self.len;
        std::iter::from_fn(move || {
            let extended =
                u32::from_ne_bytes(bytes.get(EXTENDED_LEN_AT..)?.first_chunk().copied()?);
            let record = bytes.split_off(..(len + extended.min(extended_max)) as usize)?;
            Some(record)
        })
    }

    /// The records of all threads in a namespace and below it.
    pub(super) fn copy(&self, namespace: Namespace) -> io::Result<Vec<u8>> {
        self.ask(namespace, false)?;
        bpf::read_all(bpf::link_to_tasks(self.program.as_fd())?.as_fd())
    }

    /// The same without extended registers, which are a third of a record or more.
    pub(super) fn copy_marks(&self, namespace: Namespace) -> io::Result<Vec<u8>> {
        self.ask(namespace, true)?;
        bpf::read_all(bpf::link_to_tasks(self.program.as_fd())?.as_fd())
    }

    /// The record of one thread; `depth` says from which of its pid namespaces on.
    pub(super) fn copy_of(&self, tid: i32, depth: u32) -> io::Result<Vec<u8>> {
        self.ask(Namespace { address: 0, depth }, false)?;
        bpf::read_all(bpf::link_to_task(self.program.as_fd(), tid)?.as_fd())
    }

    fn ask(&self, namespace: Namespace, brief: bool) -> io::Result<()> {
        let mut question = [0u8; QUESTION];
        question[..8].copy_from_slice(&namespace.address.to_ne_bytes());
        question[8..16].copy_from_slice(&(u64::from(namespace.depth) * NUMBER).to_ne_bytes());
        question[16..].copy_from_slice(&u64::from(brief).to_ne_bytes());
        bpf::set_entry(self.question.as_fd(), &question)
    }
}

/// `struct upid`: the number, and at 8 the namespace.
const NUMBER: u64 = 16;

/// Registers: 6 the text to be written, 7 the task, 8 the room, 9 the question.
fn program(
    question: BorrowedFd<'_>,
    room: BorrowedFd<'_>,
    fields: &Fields,
    extended: u32,
) -> Vec<u64> {
    const KEY: i16 = -8;
    const SIZE: i16 = -16;
    const REGISTERS: i16 = -24;
    let slot = |base: Base| -32 - 8 * base as i16;
    let mut code = Code::default();
    let [no_task, no_room, no_question] = code.begin(room, question, KEY);
    for at in (slot(Base::Namespace)..=KEY).step_by(8) {
        code.add(STORE, 10, 0, at, 0);
    }

    // Its numbers, if it is not dead and collected; whether it is in the namespace.
    code.add(COPY, 3, 7, 0, 0).add(ADD, 3, 0, 0, fields.pointers[0].cast_signed());
    code.stack(1, slot(Base::Number)).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);
    code.add(LOAD, 3, 10, slot(Base::Number), 0);
    let no_number = code.jump(IF_EQUAL, 3, 0);
    let numbers = |code: &mut Code, offset: u32| {
        code.add(LOAD, 3, 10, slot(Base::Number), 0).add(LOAD, 4, 9, 8, 0);
        code.add(ADD_REGISTER, 3, 4, 0, 0).add(ADD, 3, 0, 0, (fields.numbers + offset) as i32);
    };
    numbers(&mut code, 8);
    code.stack(1, SIZE).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);
    code.add(LOAD, 1, 9, 0, 0).add(LOAD, 2, 10, SIZE, 0);
    let any = code.jump(IF_EQUAL, 1, 0);
    let wanted = code.jump_beside(IF_SAME, 1, 2);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.land(any).land(wanted);
    code.add(STORE_REGISTER, 8, 2, 0, 0);
    numbers(&mut code, 0);
    code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, NUMBERS_AT as i32);
    code.add(SET, 2, 0, 0, (16 * DEPTH_MAX) as i32).call(helper::READ_KERNEL);
    // The last of its namespaces.
    source(&mut code, Base::Number, slot(Base::Number), fields.depth);
    code.stack(1, SIZE).add(SET, 2, 0, 0, 4).call(helper::READ_KERNEL);
    code.add(LOAD_WORD, 4, 10, SIZE, 0).add(SHIFT_LEFT, 4, 0, 0, 4);
    code.add(LOAD, 3, 10, slot(Base::Number), 0).add(ADD_REGISTER, 3, 4, 0, 0);
    code.add(ADD, 3, 0, 0, (fields.numbers + 8).cast_signed());
    code.stack(1, slot(Base::Namespace)).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);

    // What it points to. Where a pointer leads nowhere, zeros are read.
    for ((to, from, ..), offset) in POINTERS.iter().zip(&fields.pointers) {
        source(&mut code, *from, slot(*from), *offset);
        code.stack(1, slot(*to)).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);
    }
    for place in fields.all() {
        source(&mut code, place.base, slot(place.base), place.offset);
        code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, place.at.cast_signed());
        code.add(SET, 2, 0, 0, place.len.cast_signed()).call(helper::READ_KERNEL);
    }

    // Registers.
    code.add(COPY, 1, 7, 0, 0).call(helper::REGISTERS_OF_TASK);
    code.add(COPY, 3, 0, 0, 0).add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, REGISTERS_AT as i32);
    code.add(SET, 2, 0, 0, REGISTERS_LEN as i32).call(helper::READ_KERNEL);
    source(&mut code, Base::Task, 0, fields.extended);
    code.stack(1, REGISTERS).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);
    code.add(LOAD, 3, 10, REGISTERS, 0).add(ADD, 3, 0, 0, fields.extended_size.cast_signed());
    code.stack(1, SIZE).add(SET, 2, 0, 0, 4).call(helper::READ_KERNEL);
    code.add(LOAD_WORD, 2, 10, SIZE, 0).add(LOAD, 1, 9, 16, 0);
    let whole = code.jump(IF_EQUAL, 1, 0);
    code.add(SET, 2, 0, 0, 0);
    code.land(whole);
    code.add(STORE_REGISTER, 8, 2, EXTENDED_LEN_AT as i16, 0);
    let fits = code.jump(IF_AT_MOST, 2, extended.cast_signed());
    code.add(SET, 2, 0, 0, extended.cast_signed());
    code.land(fits);
    // The question is not needed any more.
    code.add(COPY, 9, 2, 0, 0);
    code.add(LOAD, 3, 10, REGISTERS, 0).add(ADD, 3, 0, 0, fields.extended_start.cast_signed());
    code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, fields.len.cast_signed());
    code.call(helper::READ_KERNEL);

    code.add(COPY, 1, 6, 0, 0).add(COPY, 2, 8, 0, 0);
    code.add(COPY, 3, 9, 0, 0).add(ADD, 3, 0, 0, fields.len.cast_signed());
    code.call(helper::WRITE);
    code.land(no_task).land(no_room).land(no_question).land(no_number);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}

/// Puts the address of a member into register 3.
fn source(code: &mut Code, base: Base, slot: i16, offset: u32) {
    match base {
        Base::Task => code.add(COPY, 3, 7, 0, 0),
        _ => code.add(LOAD, 3, 10, slot, 0),
    };
    code.add(ADD, 3, 0, 0, offset.cast_signed());
}
