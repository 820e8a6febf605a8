//! The seed of containers, for this crate's own tests. The daemon is its own seed.

fn main() -> std::process::ExitCode {
    ckpt_engine::container::seed_main()
}
