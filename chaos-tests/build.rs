//! `selfcheck` runs inside VEs, whose C library may be older than that of the host that it is built on.

fn main() {
    // The standard library does without these where they are missing, but the linker notes that the
    // C library must have their version if that of the host does (glibc 2.39).
    for symbol in ["pidfd_spawnp", "pidfd_getpid"] {
        println!("cargo::rustc-link-arg-bin=selfcheck=-Wl,--defsym={symbol}=0");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
