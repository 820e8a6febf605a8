//! The simplest workload: something that must stay as it is.

use std::fmt::Debug;
use std::time::Duration;

use super::context::Context;
use super::outcome::{Failure, same};

/// What `look` sees must stay as it was at first. `damage` changes it, where that is asked for.
pub fn keep<T: PartialEq + Debug + Clone>(
    context: &mut Context,
    what: &str,
    look: impl Fn() -> Result<T, Failure>,
    mut damage: impl FnMut() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let before = look()?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            damage()?;
        }
        same(what, look()?, before.clone())?;
    }
    Ok(())
}
