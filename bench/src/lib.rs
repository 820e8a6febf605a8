//! How far we are from the physical limit, and from the ways people do it today.
//!
//! One program per question, in `bin`. Each measures the limit and the peers in the same run on
//! the same machine, repeats what it measures and tells medians, and judges them by the table in
//! [`goals`]. What they share is here: the [`stage`] that a benchmark plays on, the [`client`]
//! programs that put load on it, how to [`measure`], and how to [`show`] what came out.

pub mod arguments;
pub mod ballast;
pub mod client;
pub mod goals;
pub mod measure;
pub mod peers;
pub mod show;
pub mod stage;
pub mod wire;
