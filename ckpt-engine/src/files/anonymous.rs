//! What has no file behind it, and only a name for its kind.

use super::{capture::Class, find::Refusal};

/// The kind of what has this in its link, behind `anon_inode:`.
pub(super) fn class(name: &[u8]) -> Result<Class, Refusal> {
    Ok(match name {
        b"[eventfd]" => Class::Event,
        b"[timerfd]" => Class::Timer,
        b"[signalfd]" => Class::Signal,
        b"[eventpoll]" => Class::Epoll,
        b"inotify" => Class::Inotify,
        b"[fanotify]" => Class::Fanotify,
        other => return Err(refusal(other)),
    })
}

fn refusal(name: &[u8]) -> Refusal {
    let (what, hint): (&str, &str) = match name {
        b"[io_uring]" => ("an io_uring ring", "stop the program, or start it without io_uring"),
        b"[userfaultfd]" => ("a userfaultfd", "stop the program"),
        b"[perf_event]" => ("a performance counter", "stop the profiler"),
        b"bpf-prog" | b"bpf-map" | b"bpf_link" | b"btf" => ("a BPF object", "stop the program"),
        b"seccomp notify" => ("a seccomp supervisor", "stop the program"),
        b"[fscontext]" | b"[mount]" => ("an unfinished mount", "try again"),
        other if other.starts_with(b"kvm-") => {
            ("a virtual machine (/dev/kvm)", "stop the virtual machine")
        }
        other => {
            let name = String::from_utf8_lossy(other);
            return Refusal::new(format!("an object of the kind {name}"), "end the program");
        }
    };
    Refusal::new(what, hint)
}
