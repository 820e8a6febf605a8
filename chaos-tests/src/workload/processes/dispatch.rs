//! System calls that go to the program's own handler.

use std::time::Duration;

use ckpt_engine::sys::program::dispatch;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure};

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    context.has_handlers = true;
    dispatch::set(true)?;
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            dispatch::set(false)?;
        }
        ensure(dispatch::catches(), || "a call did not go to the handler".to_owned())?;
    }
    Ok(())
}
