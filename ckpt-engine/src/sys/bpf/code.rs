//! Instructions of BPF programs (`struct bpf_insn`, Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::{AsRawFd, BorrowedFd};

/// Loads eight bytes.
pub const LOAD: u8 = 0x79;
/// Loads four bytes.
pub const LOAD_WORD: u8 = 0x61;
/// Stores a constant in eight bytes.
pub const STORE: u8 = 0x7a;
/// Stores a register in eight bytes.
pub const STORE_REGISTER: u8 = 0x7b;
/// Sets a register to another one.
pub const COPY: u8 = 0xbf;
/// Sets a register to a constant.
pub const SET: u8 = 0xb7;
/// Adds a constant.
pub const ADD: u8 = 0x07;
/// Adds a register.
pub const ADD_REGISTER: u8 = 0x0f;
/// Shifts to the left by a constant.
pub const SHIFT_LEFT: u8 = 0x67;
/// Shifts to the right by a constant.
pub const SHIFT_RIGHT: u8 = 0x77;
/// Leaves only the bits of a constant.
pub const AND: u8 = 0x57;
/// Jumps if equal to a constant.
pub const IF_EQUAL: u8 = 0x15;
/// Jumps unless equal to a constant.
pub const UNLESS_EQUAL: u8 = 0x55;
/// Jumps if not greater than a constant.
pub const IF_AT_MOST: u8 = 0xb5;
/// Jumps if equal to a register.
pub const IF_SAME: u8 = 0x1d;
/// Calls a function of the kernel.
pub const CALL: u8 = 0x85;
/// Ends the program.
pub const EXIT: u8 = 0x95;
const LOAD_LONG: u8 = 0x18;

/// Functions by their number (`enum bpf_func_id`).
pub mod helper {
    /// `bpf_map_lookup_elem`
    pub const LOOK_UP: i32 = 1;
    /// `bpf_probe_read_kernel`
    pub const READ_KERNEL: i32 = 113;
    /// `bpf_seq_write`
    pub const WRITE: i32 = 127;
    /// `bpf_task_pt_regs`
    pub const REGISTERS_OF_TASK: i32 = 175;
    /// `bpf_map_lookup_percpu_elem`
    pub const LOOK_UP_OF_PROCESSOR: i32 = 195;
}

/// A program that is being written.
#[derive(Debug, Default)]
pub struct Code(Vec<u64>);

impl Code {
    /// An instruction: what, the register it changes, the one it reads, offset, constant.
    pub fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, constant: i32) -> &mut Self {
        self.0.push(
            u64::from(code)
                | u64::from(to) << 8
                | u64::from(from) << 12
                | u64::from(offset.cast_unsigned()) << 16
                | u64::from(constant.cast_unsigned()) << 32,
        );
        self
    }

    /// An address on the stack.
    pub fn stack(&mut self, to: u8, offset: i16) -> &mut Self {
        self.add(COPY, to, 10, 0, 0).add(ADD, to, 0, 0, offset.into())
    }

    /// A map, by its descriptor.
    pub fn map(&mut self, to: u8, map: BorrowedFd<'_>) -> &mut Self {
        const BY_DESCRIPTOR: u8 = 1;
        self.add(LOAD_LONG, to, BY_DESCRIPTOR, 0, map.as_raw_fd()).add(0, 0, 0, 0, 0)
    }

    /// A call of one of the functions in [`helper`].
    pub fn call(&mut self, helper: i32) -> &mut Self {
        self.add(CALL, 0, 0, 0, helper)
    }

    /// A jump to where [`Self::land`] says; returns its place.
    pub fn jump(&mut self, code: u8, register: u8, constant: i32) -> usize {
        self.add(code, register, 0, 0, constant);
        self.0.len() - 1
    }

    /// A jump that compares two registers.
    pub fn jump_beside(&mut self, code: u8, register: u8, other: u8) -> usize {
        self.add(code, register, other, 0, 0);
        self.0.len() - 1
    }

    /// Lets a jump go on here.
    pub fn land(&mut self, jump: usize) -> &mut Self {
        let distance = (self.0.len() - jump - 1) as u64;
        self.0[jump] |= distance << 16;
        self
    }

    /// Begins a program that is shown tasks: the text to be written is in register 6 then, the task
    /// in 7, the entry of `room` in 8, that of `question` in 9, and a zero on the stack at `key`.
    /// Returns the jumps for when one of them is missing.
    pub fn begin(
        &mut self,
        room: BorrowedFd<'_>,
        question: BorrowedFd<'_>,
        key: i16,
    ) -> [usize; 3] {
        self.add(LOAD, 7, 1, 8, 0).add(LOAD, 6, 1, 0, 0).add(LOAD, 6, 6, 0, 0);
        // At the end of all.
        let no_task = self.jump(IF_EQUAL, 7, 0);
        self.add(STORE, 10, 0, key, 0);
        self.map(1, room).stack(2, key).call(helper::LOOK_UP);
        let no_room = self.jump(IF_EQUAL, 0, 0);
        self.add(COPY, 8, 0, 0, 0);
        self.map(1, question).stack(2, key).call(helper::LOOK_UP);
        let no_question = self.jump(IF_EQUAL, 0, 0);
        self.add(COPY, 9, 0, 0, 0);
        [no_task, no_room, no_question]
    }

    /// The instructions.
    pub fn finish(self) -> Vec<u64> {
        self.0
    }
}
