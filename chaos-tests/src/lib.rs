//! A cluster on one machine, workloads that check themselves, and clients that know every answer.

pub mod client;
pub mod pool;
pub mod scene;
pub mod stock;
pub mod table;
pub mod testbed;
pub mod workload;

/// An error with its causes, as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
