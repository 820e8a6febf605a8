//! A host for tests: a real `vzd` in a network namespace of its own, with a template of a few
//! programs of this machine, so that nothing is downloaded. All of it goes away on drop.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_engine::sys::netns::Netns;
use node::{
    api::{Client, ExecRequest, Failure, NodeRequest, NodeStatus, Request, VeRequest},
    cgroup::Hierarchies,
    template::{Cache, Digest},
    ve::{Changes, Exec, Listed},
};

/// The name of the template.
pub(crate) const TEMPLATE: &str = "tiny";

const PROGRAMS: &[&str] = &[
    "/bin/sh",
    "/bin/cat",
    "/bin/sleep",
    "/bin/hostname",
    "/usr/bin/tail",
    "/usr/bin/wc",
    "/usr/bin/id",
    "/usr/bin/touch",
];

/// Starts nothing but itself, and ends in order when told.
const INIT: &str = "#!/bin/sh\ntrap 'exit 0' TERM\ntouch /run/ready\n\
                    while :; do sleep 1000 & wait; done\n";

/// What an orderly stop runs.
const HALT: &str = "#!/bin/sh\nkill -TERM 1\n";

/// How long the daemon may take to answer.
const READY_MAX: Duration = Duration::from_secs(20);

/// A host with a daemon.
pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) netns: Netns,
    parent: String,
    daemon: Option<Child>,
}

impl Host {
    /// Starts one. `name` tells it from others of the same test program.
    pub(crate) fn start(name: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let parent = format!("ferry-test-{}-{name}", std::process::id());
        let root = directory.path();
        let config = format!(
            "state_dir = '{0}/state'\nrun_dir = '{0}/run'\ntemplate_dir = '{0}/template'\n\
             [network]\naddresses = ['10.77.255.1/16']\n[cgroup]\nparent = '{parent}'\n",
            root.display(),
        );
        fs::write(root.join("vzd.toml"), config).expect("a configuration");
        make_template(&root.join("template"));
        let netns = Netns::create().expect("a network namespace");
        let mut host = Self { directory, netns, parent, daemon: None };
        host.start_daemon();
        host
    }

    /// Starts the daemon, and waits until it answers.
    pub(crate) fn start_daemon(&mut self) {
        let config = self.directory.path().join("vzd.toml");
        let log = self.directory.path().join("vzd.log");
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let spawn = || {
            Command::new(env!("CARGO_BIN_EXE_vzd"))
                .arg("--config")
                .arg(config)
                .stdin(Stdio::null())
                .stderr(log)
                .spawn()
        };
        self.daemon = Some(self.netns.run(spawn).expect("a thread").expect("vzd"));
        let deadline = Instant::now() + READY_MAX;
        while self.ask::<NodeStatus>(&Request::Node(NodeRequest::Status)).is_err() {
            assert!(Instant::now() < deadline, "vzd does not answer:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// Ends the daemon as a crash would.
    pub(crate) fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("our child");
            daemon.wait().expect("our child");
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("vzd.log")).unwrap_or_default()
    }

    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Client::connect(&self.directory.path().join("run/vzd.sock"))
    }

    pub(crate) fn ask<T: serde::de::DeserializeOwned>(
        &self,
        request: &Request,
    ) -> Result<T, Failure> {
        self.client()?.ask(request)
    }

    /// A request about a VE whose answer says nothing.
    pub(crate) fn ve(&self, request: VeRequest) -> Result<(), Failure> {
        self.ask::<serde_json::Value>(&Request::Ve(request)).map(drop)
    }

    pub(crate) fn create(&self, ve: &str, changes: Changes) -> Result<(), Failure> {
        let template = changes.ostemplate.clone().or(Some(TEMPLATE.into()));
        let changes = Changes { ostemplate: template, ..changes };
        self.ve(VeRequest::Create { ve: ve.into(), changes })
    }

    pub(crate) fn start_ve(&self, ve: &str) -> Result<(), Failure> {
        self.ve(VeRequest::Start { ve: ve.into(), force: false, wait: true })
    }

    pub(crate) fn list(&self) -> Vec<Listed> {
        self.ask(&Request::Ve(VeRequest::List)).expect("a list")
    }

    /// Runs a shell script in a VE: what it printed, and its exit status.
    pub(crate) fn run(&self, ve: &str, script: &str) -> (String, i32) {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let null = File::open("/dev/null").expect("/dev/null");
        let arguments = ["/bin/sh", "-c", script].map(str::to_owned).into();
        let exec = Exec { arguments, terminal: None };
        let request = Request::Ve(VeRequest::Exec(ExecRequest { ve: ve.into(), exec }));
        let streams = [null.as_fd(), writer.as_fd(), writer.as_fd()];
        let client = self.client().expect("the daemon");
        let code = client.call(&request, &streams, &mut |_, _| ()).expect("an exit status");
        drop(writer);
        let mut output = String::new();
        reader.read_to_string(&mut output).expect("output");
        (output, code)
    }

    /// All cgroups of this host's VEs, in all hierarchies.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for parent in self.parents() {
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            found.extend(entries.filter(|it| it.path().is_dir()).map(|it| it.path()));
        }
        found
    }

    fn parents(&self) -> Vec<PathBuf> {
        let hierarchies = Hierarchies::find().expect("cgroups");
        let tops = hierarchies.legacy.iter().map(|(_, top)| top.clone());
        tops.chain([hierarchies.unified]).map(|top| top.join(&self.parent)).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_daemon();
        for cgroup in self.cgroups() {
            // Only the one in the v2 hierarchy has it; all processes are in that.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let populated = || {
                fs::read_to_string(cgroup.join("cgroup.events"))
                    .is_ok_and(|text| text.contains("populated 1"))
            };
            while populated() {
                std::thread::yield_now();
            }
        }
        for cgroup in self.cgroups() {
            let _ = fs::remove_dir(cgroup.join("ve"));
            let _ = fs::remove_dir(cgroup);
        }
        for parent in self.parents() {
            let _ = fs::remove_dir(parent);
        }
        if std::thread::panicking() {
            eprintln!("vzd said:\n{}", self.log());
        }
    }
}

/// Puts the template and its cache where a build would have put them.
fn make_template(directory: &Path) {
    let root = tempfile::tempdir().expect("a directory");
    for program in PROGRAMS {
        install(Path::new(program), root.path());
    }
    for name in ["proc", "sys", "dev", "run", "tmp", "etc", "root", "sbin"] {
        fs::create_dir_all(root.path().join(name)).expect("a directory");
    }
    for (name, text) in [("sbin/init", INIT), ("sbin/halt", HALT)] {
        let path = root.path().join(name);
        fs::write(&path, text).expect("a script");
        let run = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, run).expect("a mode");
    }
    let mut builder = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).expect("an encoder"));
    builder.follow_symlinks(false);
    builder.append_dir_all(".", root.path()).expect("an archive");
    let bytes = builder.into_inner().expect("the end").finish().expect("the end");
    let digest: Digest = blake3::hash(&bytes).into();
    for name in ["cache", "archive"] {
        fs::create_dir_all(directory.join(name)).expect("a directory");
    }
    fs::write(directory.join(format!("archive/{digest}.tar.zst")), &bytes).expect("an archive");
    let cache = Cache { digest, size_bytes: bytes.len() as u64, built_s: 0 };
    let cache = toml::to_string(&cache).expect("plain data");
    fs::write(directory.join(format!("cache/{TEMPLATE}.toml")), cache).expect("a cache");
    let metadata = "description = 'a shell'\nsuite = 'none'\nvariant = 'none'\n\
                    ready_file = '/run/ready'\n";
    fs::write(directory.join(format!("{TEMPLATE}.toml")), metadata).expect("metadata");
}

/// Copies a program and the libraries that it loads.
fn install(program: &Path, root: &Path) {
    let listing = Command::new("ldd").arg(program).output().expect("ldd");
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    let libraries = listing.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.map(Path::new).chain([program]) {
        let to = root.join(file.strip_prefix("/").expect("absolute"));
        fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        fs::copy(file, &to).expect("a copy");
    }
}
