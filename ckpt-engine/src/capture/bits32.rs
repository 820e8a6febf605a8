//! What only programs of 32 bits have, and those of 64 that contain such code.

use super::thread::has_segments;
use crate::inject::{Gate, InjectError, Stopped};

/// The list of locks that each thread gives back at its end (set_robust_list(2)): the kernel keeps
/// one for each interface.
pub(super) fn robust_lists(
    gate: Gate,
    threads: &[Stopped],
) -> Result<Vec<(u64, u64)>, InjectError> {
    const GET_ROBUST_LIST: i64 = 312;
    let of_thread = |thread: &Stopped| {
        let mut batch = gate.batch_32();
        let (head, len) = (batch.room(4), batch.room(4));
        let call = batch.call("get_robust_list", GET_ROBUST_LIST, &[0, head, len]);
        let done = batch.run(thread)?;
        done.value(call)?;
        Ok((done.word(head).into(), done.word(len).into()))
    };
    threads.iter().map(of_thread).collect()
}

/// The segments that all threads have in common (modify_ldt(2)), up to the last that is used.
pub(super) fn local_segments(
    leader: &Stopped,
    gate: Gate,
    threads: &[Stopped],
) -> Result<Vec<u8>, InjectError> {
    const READ: u64 = 0;
    const SEGMENT: usize = 8;
    /// `LDT_ENTRIES`.
    const ALL: usize = 8192 * SEGMENT;
    if !threads.iter().any(|thread| has_segments(&thread.registers)) {
        return Ok(Vec::new());
    }
    let mut batch = gate.batch();
    let room = batch.room(ALL);
    let call = batch.call("modify_ldt", libc::SYS_modify_ldt, &[READ, room, ALL as u64]);
    let done = batch.run(leader)?;
    let len = match done.result(call) {
        // The kernel knows the result as one of 32 bits.
        Ok(len) => len as u32 as usize,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => 0,
        Err(_) => return done.value(call).map(|_| Vec::new()),
    };
    let bytes = done.data(room, len.min(ALL));
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last / SEGMENT + 1);
    Ok(bytes[..used * SEGMENT].to_vec())
}
