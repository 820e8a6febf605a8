//! What runs on the client host: measurements from outside the VE.

pub mod control;
pub mod exchange;
pub mod hold;
pub mod press;
pub mod probe;
pub mod sweep;
pub mod writes;
