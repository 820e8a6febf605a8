//! What a process has used of the machine.

use std::fs;
use std::time::Duration;

/// The time on processors that a process has used so far, with all its threads.
pub fn processor_time(pid: i32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything.
    let rest = text.rsplit_once(") ")?.1;
    let mut words = rest.split(' ').skip(11).map(str::parse::<u64>);
    let (user, system) = (words.next()?.ok()?, words.next()?.ok()?);
    // USER_HZ is 100 on x86-64, always.
    Some(Duration::from_millis((user + system) * 10))
}

/// Lets [`peak_memory_kib`] start again from what the process has now.
pub fn forget_peak(pid: i32) {
    // Without it the peak is that since the start, which is no less true.
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The most memory that a process had at a time.
pub fn peak_memory_kib(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(processor_time(own).is_some());
        forget_peak(own);
        assert!(peak_memory_kib(own).unwrap() > 100);
    }
}
