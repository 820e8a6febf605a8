//! What only programs of 32 bits have, and those of 64 that contain such code.
//!
//! A process of the skeleton has once executed a program of 64 bits, and stays that to the kernel
//! in one respect: its address space could be larger than a program of 32 bits can use. Where
//! memory is put, by which interface a handler of signals is called, and which locks are given
//! back, the kernel decides by the interface of the call that asks for it.

use std::io;

use ckpt_format::process::{Process, Segment, SignalAction};

use super::{Bone, RebuildError, Skeleton, complete::can_be_set};
use crate::{
    areas,
    inject::{Batch, Done, InjectError, Vdso},
    sys::ptrace,
};

const SET_ROBUST_LIST: i64 = 311;
const RT_SIGACTION: i64 = 174;

impl Bone {
    /// The vdso that it has been given.
    pub(super) fn vdso(&self) -> Result<Vdso, InjectError> {
        areas::vdso(&self.areas).ok_or(InjectError::NoVdso)
    }

    /// Whether it is to be a program of 32 bits.
    pub(super) fn is_32_bit(&self) -> bool {
        self.vdso().is_ok_and(|vdso| vdso.is_32_bit)
    }
}

impl Skeleton {
    /// What must be asked for by the calls of such a program: handlers of signals, which are
    /// called in the way of whoever has set them, and the locks of each thread.
    pub(super) fn set_as_32_bit(&self, bone: &Bone, process: &Process) -> Result<(), RebuildError> {
        let stopped = std::iter::once(&bone.thread).chain(&bone.others);
        for (place, (stopped, thread)) in stopped.zip(process.living()).enumerate() {
            let mut batch = self.gate.batch_32();
            if place == 0 {
                set_actions(&mut batch, &process.actions);
            }
            let (head, len) = thread.robust_list;
            if len != 0 {
                batch.call("set_robust_list", SET_ROBUST_LIST, &[head, len]);
            }
            if !batch.is_empty() {
                batch.run(stopped)?.all().map_err(bone.failed("set its handlers and locks"))?;
            }
        }
        Ok(())
    }

    /// The segments that all threads of a process have in common.
    pub(super) fn set_local_segments(
        &self,
        bone: &Bone,
        process: &Process,
    ) -> Result<(), RebuildError> {
        const WRITE: u64 = 0x11;
        let mut batch = self.gate.batch();
        let failed = bone.failed("set its segments");
        for (number, segment) in (0..).zip(process.local_segments.chunks_exact(8)) {
            let bits = segment.try_into().map_or(0, u64::from_le_bytes);
            if bits == 0 {
                continue;
            }
            let Segment { entry, base, limit, flags } = described(number, bits);
            let words = [entry, base, limit, flags];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let address = batch.bytes(&bytes);
            batch.call("modify_ldt", libc::SYS_modify_ldt, &[WRITE, address, 16]);
            if batch.is_nearly_full() {
                let full = std::mem::replace(&mut batch, self.gate.batch());
                check(&full.run(&bone.thread)?).map_err(&failed)?;
            }
        }
        match batch.is_empty() {
            true => Ok(()),
            false => check(&batch.run(&bone.thread)?).map_err(&failed),
        }
    }
}

/// The kernel gives results of modify_ldt(2) as numbers of 32 bits, errors as well.
fn check(done: &Done) -> Result<(), InjectError> {
    done.all()?;
    match done.results().find(|&result| result != 0) {
        None => Ok(()),
        Some(result) => Err(InjectError::Call {
            call: "modify_ldt".into(),
            tid: done.thread(),
            source: io::Error::from_raw_os_error((result as u32).cast_signed().wrapping_neg()),
        }),
    }
}

/// From a descriptor of the processor to what modify_ldt(2) wants to be told.
fn described(entry: u32, bits: u64) -> Segment {
    let part = |shift: u32, mask: u64| (bits >> shift & mask) as u32;
    let base = part(16, 0xff_ffff) | part(56, 0xff) << 24;
    let limit = part(0, 0xffff) | part(48, 0xf) << 16;
    let (kind, present) = (part(40, 0xf), part(47, 1));
    let (available, long, wide, pages) = (part(52, 1), part(53, 1), part(54, 1), part(55, 1));
    let (contents, read_only) = (kind >> 2 & 3, (kind >> 1 & 1) ^ 1);
    let flags = wide
        | contents << 1
        | read_only << 3
        | pages << 4
        | (present ^ 1) << 5
        | available << 6
        | long << 7;
    Segment { entry, base, limit, flags }
}

/// Gives a thread its own segments; before its registers, which refer to them.
pub(super) fn set_segments(tid: i32, segments: &[Segment]) -> io::Result<()> {
    segments.iter().try_for_each(|&segment| ptrace::set_segment(tid, segment))
}

/// `struct sigaction` of the i386 interface: all but the mask are words of 32 bits.
fn set_actions(batch: &mut Batch, actions: &[SignalAction]) {
    for (signal, action) in can_be_set(actions) {
        let words = [action.handler as u32, action.flags as u32, action.restorer as u32];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(action.mask.to_le_bytes());
        let address = batch.bytes(&bytes);
        batch.call("rt_sigaction", RT_SIGACTION, &[signal, address, 0, 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_understood() {
        // Data of 4 GiB from 0x12345678 on, to be written, in units of pages.
        let bits = 0x12cf_f334_5678_ffff;
        let flags = 1 | 1 << 4 | 1 << 6;
        let without_available =
            Segment { entry: 3, base: 0x1234_5678, limit: 0xf_ffff, flags: 0x11 };
        assert_eq!(described(3, bits), without_available);
        let with_available = Segment { flags, ..without_available };
        assert_eq!(described(3, bits | 1 << 52), with_available);
        // Code that can be executed and read, of bytes.
        let code = described(1, 0x0040_fa00_0000_0fff);
        assert_eq!(code, Segment { entry: 1, base: 0, limit: 0xfff, flags: 1 | 2 << 1 });
    }
}
