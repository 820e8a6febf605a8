//! What became of the calls that a process has made for us.

use std::io;

use super::{ENTRY, InjectError, check_return};

/// What a [`Batch`](super::Batch) gave.
#[derive(Debug)]
pub struct Done {
    pub(super) tid: i32,
    pub(super) names: Vec<&'static str>,
    pub(super) steps: Vec<(usize, &'static str)>,
    pub(super) table: Vec<u8>,
    /// The tasks born by clone calls, in order, as numbered on the host; stopped, or about to.
    pub births: Vec<i32>,
    pub(super) data: Vec<u8>,
    pub(super) data_start: u64,
}

impl Done {
    /// The result of one call.
    pub fn result(&self, index: usize) -> io::Result<u64> {
        check_return(self.word_of(index, 7).cast_signed())
    }

    /// The number of a call, its six arguments, and what it returned.
    fn word_of(&self, index: usize, word: usize) -> u64 {
        let at = index * ENTRY + word * 8;
        u64::from_le_bytes(self.table[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The result of one call, or an error that names the call with its arguments.
    pub fn value(&self, index: usize) -> Result<u64, InjectError> {
        self.result(index).map_err(|source| InjectError::Call {
            call: {
                let arguments =
                    [1, 2, 3, 4, 5, 6].map(|word| format!("{:#x}", self.word_of(index, word)));
                format!("{}({})", self.names[index], arguments.join(", ")).into()
            },
            tid: self.tid,
            source,
        })
    }

    /// What all calls returned, in order.
    pub fn results(&self) -> impl Iterator<Item = i64> {
        (0..self.names.len()).map(|index| self.word_of(index, 7).cast_signed())
    }

    /// The thread that made them, as numbered on the host.
    pub fn thread(&self) -> i32 {
        self.tid
    }

    /// The first failure, if any call failed.
    pub fn all(&self) -> Result<(), InjectError> {
        (0..self.names.len()).try_for_each(|index| self.value(index).map(drop))
    }

    /// As [`Self::all`], with what the call was made for as [`super::Batch::step`] said it.
    pub fn all_steps(&self) -> Result<(), (&'static str, InjectError)> {
        (0..self.names.len()).try_for_each(|index| {
            self.value(index).map(drop).map_err(|error| {
                let step = self.steps.iter().rev().find(|(first, _)| *first <= index);
                (step.map_or("make its calls", |&(_, what)| what), error)
            })
        })
    }

    /// The bytes that stand now where [`super::Batch::bytes`] or [`super::Batch::room`] put data.
    pub fn data(&self, address: u64, len: usize) -> &[u8] {
        let start = (address - self.data_start) as usize;
        &self.data[start..start + len]
    }

    /// A 64-bit number in the data.
    pub fn number(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.data(address, 8).try_into().expect("eight bytes"))
    }

    /// A 32-bit number in the data.
    pub fn word(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.data(address, 4).try_into().expect("four bytes"))
    }
}
