//! A VE's files follow it: two containers over one template, changes in one, rounds, and then
//! both must show exactly the same. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its containers has failed")]

mod compare;
mod hostile;
mod mapped;
mod mutate;
mod pair;
mod rounds;
