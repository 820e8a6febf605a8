//! `vzd`, the node daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    node::program::main()
}
