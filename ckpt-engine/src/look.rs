//! Reads the kernel's memory at many places in one look.

use std::{
    fs,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::sys::bpf::{
    self, MapKind,
    code::{ADD, COPY, Code, EXIT, IF_AT_MOST, IF_EQUAL, LOAD, SET, STORE, STORE_REGISTER, helper},
};

/// How many places there are in one look.
const PLACES: usize = 48;
/// How many bytes at each.
const LEN: usize = 256;
/// An answer: what the kernel says about the reading, and the bytes.
const ANSWER: usize = 8 + LEN;
const QUESTION: usize = 16 * PLACES;

/// A program that copies what stands at addresses that it is given.
#[derive(Debug)]
pub(crate) struct Look {
    question: OwnedFd,
    link: OwnedFd,
}

impl Look {
    /// `iterator` is the number of the kernel's function that shows tasks. Which one is shown does
    /// not matter: it is one of ours.
    pub(crate) fn new(iterator: u32) -> io::Result<Self> {
        let question = bpf::map(MapKind::Array, QUESTION as u32)?;
        let room = bpf::map(MapKind::Array, (ANSWER * PLACES) as u32)?;
        let program = program(question.as_fd(), room.as_fd());
        let program = bpf::load_for_tasks(&program, iterator)?;
        let link = bpf::link_to_task(program.as_fd(), std::process::id().cast_signed())?;
        Ok(Self { question, link })
    }

    /// What stands at each of these addresses, with so many bytes.
    pub(crate) fn at(&self, wanted: &[(u64, usize)]) -> io::Result<Vec<Vec<u8>>> {
        let found = self.where_possible(wanted)?.into_iter().collect::<Option<_>>();
        found.ok_or(io::Error::from_raw_os_error(libc::EFAULT))
    }

    /// The same; nothing for those that lead nowhere.
    pub(crate) fn where_possible(
        &self,
        wanted: &[(u64, usize)],
    ) -> io::Result<Vec<Option<Vec<u8>>>> {
        let pieces = wanted.iter().enumerate().flat_map(|(index, &(address, len))| {
            (0..len).step_by(LEN).map(move |at| (index, address + at as u64, LEN.min(len - at)))
        });
        let pieces: Vec<_> = pieces.collect();
        let mut found = vec![Some(Vec::new()); wanted.len()];
        for some in pieces.chunks(PLACES) {
            let mut question = [0; QUESTION];
            for (entry, &(_, address, len)) in question.chunks_exact_mut(16).zip(some) {
                entry[..8].copy_from_slice(&address.to_ne_bytes());
                entry[8..].copy_from_slice(&(len as u64).to_ne_bytes());
            }
            bpf::set_entry(self.question.as_fd(), &question)?;
            let mut answer = vec![0; ANSWER * PLACES];
            fs::File::from(bpf::iterator(self.link.as_fd())?).read_exact(&mut answer)?;
            for (answer, &(index, _, len)) in answer.chunks_exact(ANSWER).zip(some) {
                let (failed, bytes) = answer.split_at(8);
                match &mut found[index] {
                    Some(read) if failed.iter().all(|byte| *byte == 0) => {
                        read.extend_from_slice(&bytes[..len]);
                    }
                    read => *read = None,
                }
            }
        }
        Ok(found)
    }
}

/// Registers: 6 the text to be written, 8 the room, 9 the question.
fn program(question: BorrowedFd<'_>, room: BorrowedFd<'_>) -> Vec<u64> {
    const KEY: i16 = -8;
    let mut code = Code::default();
    let [no_task, no_room, no_question] = code.begin(room, question, KEY);
    for place in 0..PLACES {
        let (asked, answer) = ((16 * place) as i16, (ANSWER * place) as i16);
        code.add(STORE, 8, 0, answer, 0).add(LOAD, 3, 9, asked, 0);
        let none = code.jump(IF_EQUAL, 3, 0);
        code.add(LOAD, 2, 9, asked + 8, 0);
        let fits = code.jump(IF_AT_MOST, 2, LEN as i32);
        code.add(SET, 2, 0, 0, LEN as i32);
        code.land(fits);
        code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, i32::from(answer) + 8);
        code.call(helper::READ_KERNEL).add(STORE_REGISTER, 8, 0, answer, 0);
        code.land(none);
    }
    code.add(COPY, 1, 6, 0, 0).add(COPY, 2, 8, 0, 0).add(SET, 3, 0, 0, (ANSWER * PLACES) as i32);
    code.call(helper::WRITE);
    code.land(no_task).land(no_room).land(no_question);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}
