//! The templates of the benchmarks, made where all testbeds look for them.

use std::fs;
use std::path::Path;

use super::{StageError, system};

/// Debian with redis, PostgreSQL and nginx, of which only redis starts at boot.
pub const SERVICES: &str = "bench-services";

const SERVICES_TEXT: &str = r#"
base = "debian-12-minimal"
description = "for benchmarks: debian-12-minimal with PostgreSQL and nginx, which do not start at boot"
packages = ["postgresql-15", "postgresql-client-15", "nginx-light"]
commands = [
    "update-rc.d -f postgresql remove >/dev/null 2>&1 || true",
    "update-rc.d -f nginx remove >/dev/null 2>&1 || true",
]
"#;

/// Debian with init, syslog, cron, sshd, a mail daemon and a web server, all of which run.
pub const HOST: &str = "bench-host";

const HOST_TEXT: &str = r#"
base = "debian-12-minimal"
description = "for benchmarks: init, syslog, cron, sshd, a mail daemon and a web server"
packages = ["busybox-syslogd", "cron", "openssh-server", "exim4-daemon-light", "nginx-light"]
commands = [
    "update-rc.d -f redis-server remove >/dev/null 2>&1 || true",
    # One worker, as a small site has.
    "sed -i 's/^worker_processes .*/worker_processes 1;/' /etc/nginx/nginx.conf",
]
"#;

/// Writes a template for those that look into this folder.
pub fn write(folder: &Path, name: &str) -> Result<(), StageError> {
    let text = match name {
        SERVICES => SERVICES_TEXT,
        HOST => HOST_TEXT,
        _ => return Ok(()),
    };
    fs::create_dir_all(folder).map_err(system("make the folder of templates"))?;
    let path = folder.join(format!("{name}.toml"));
    // One that is being read is never seen half.
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let draft = folder.join(format!("{name}.{}.draft", std::process::id()));
    fs::write(&draft, text).map_err(system("write a template"))?;
    fs::rename(&draft, &path).map_err(system("write a template"))
}
