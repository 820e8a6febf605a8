//! The testbed does what it promises, and leaves nothing behind.
//!
//! Needs root, and the programs of the workspace (`cargo build --release`).
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its hosts has failed")]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use chaos_tests::testbed::{
    DEFAULT_DIRECTORY, Host, Options, TemporaryTestbed, Testbed, TestbedError,
};
use ckpt_engine::sys::netns::Netns;

const NODE1: Host = Host::Node(1);
const NODE2: Host = Host::Node(2);

fn options(name: &str) -> Options {
    let mut options = Options::new(name).unwrap();
    options.nodes = 2;
    options.cluster = false;
    options
}

/// Where `ip netns` would find a host of a testbed.
fn netns(name: &str, host: &Host) -> Netns {
    Netns::open(Path::new(&format!("/run/netns/ferry-{name}-{host}"))).unwrap()
}

/// True when a datagram from one host reaches the other.
fn reaches(name: &str, from: &Host, to: &Host) -> bool {
    let receiver = netns(name, to).run(|| UdpSocket::bind((to.address(), 0)).unwrap()).unwrap();
    let sender = netns(name, from).run(|| UdpSocket::bind((from.address(), 0)).unwrap()).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    sender.send_to(b"?", receiver.local_addr().unwrap()).unwrap();
    receiver.recv(&mut [0; 1]).is_ok()
}

/// Everything on this machine that carries the testbed's name.
fn residue(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut note = |path: PathBuf| {
        if path.exists() {
            found.push(path.display().to_string());
        }
    };
    note(Path::new(DEFAULT_DIRECTORY).join(name));
    note(Path::new(DEFAULT_DIRECTORY).join(format!(".{name}.lock")));
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let mount = Path::new(line.split(' ').nth(4).unwrap());
        note(mount.join(format!("ferry-testbed-{name}")));
        for own in own.lines().filter_map(|line| line.splitn(3, ':').nth(2)) {
            let below = mount.join(own.trim_start_matches('/'));
            note(below.join(format!("ferry-testbed-{name}")));
        }
    }
    let words = [format!("ferry-{name}-"), format!("ferry-testbed/{name}/")];
    let named = |text: &str| words.iter().any(|word| text.contains(word));
    found.extend(mounts.lines().filter(|line| named(line)).map(str::to_owned));
    if let Ok(entries) = std::fs::read_dir("/run/netns") {
        let names = entries.map(|entry| entry.unwrap().file_name().display().to_string());
        found.extend(names.filter(|name| named(name)));
    }
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let cgroup = std::fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        let command = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let ours = cgroup.contains(&format!("ferry-testbed-{name}/"))
            || named(&String::from_utf8_lossy(&command));
        if ours && path.join("exe").read_link().is_ok() {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_cut_stops_two_hosts_and_no_others() {
    let name = "tcut";
    let mut testbed = TemporaryTestbed::up(&options(name)).unwrap();
    let pairs = [(NODE1, NODE2), (NODE2, NODE1), (NODE1, Host::Client), (Host::Client, NODE2)];
    let reached = || pairs.map(|(from, to)| reaches(name, &from, &to));
    assert_eq!(reached(), [true, true, true, true]);
    testbed.cut(&NODE2, &NODE1).unwrap();
    assert_eq!(reached(), [false, false, true, true]);
    testbed.cut_all(&Host::Client).unwrap();
    assert_eq!(reached(), [false, false, false, false]);
    let cut: Vec<_> = testbed.status().into_iter().map(|host| host.cut_from.join(" ")).collect();
    assert_eq!(cut, ["client node2", "client node1", "node1 node2"]);
    testbed.heal().unwrap();
    assert_eq!(reached(), [true, true, true, true]);
}

#[test]
fn a_rate_is_kept_and_lifted() {
    let name = "trate";
    let mut testbed = TemporaryTestbed::up(&options(name)).unwrap();
    let once = || {
        let bytes = 4 << 20;
        let node = netns(name, &NODE1);
        let listener = node.run(|| TcpListener::bind((NODE1.address(), 0)).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let client = netns(name, &Host::Client);
        let mut out = client.run(|| TcpStream::connect(address).unwrap()).unwrap();
        let (mut into, _) = listener.accept().unwrap();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| into.write_all(&vec![0; bytes]).unwrap());
            out.read_exact(&mut vec![0; bytes]).unwrap();
        });
        start.elapsed()
    };
    // The shortest of a few: a machine that stands still by itself makes one longer.
    let transfer = || (0..3).map(|_| once()).min().unwrap();
    testbed.rate(&NODE1, Some("80mbit".parse().unwrap())).unwrap();
    let slow = transfer();
    testbed.rate(&NODE1, Some("160mbit".parse().unwrap())).unwrap();
    let faster = transfer();
    testbed.rate(&NODE1, None).unwrap();
    let full = transfer();
    println!("4 MiB at 80 Mbit/s {slow:?}, at 160 Mbit/s {faster:?}, at full speed {full:?}");
    assert!((350..700).contains(&slow.as_millis()), "{slow:?}");
    assert!((160..350).contains(&faster.as_millis()), "{faster:?}");
    assert!(full < Duration::from_millis(100), "{full:?}");
}

#[test]
fn a_daemon_is_killed_and_started_alone() {
    let mut testbed = TemporaryTestbed::up(&options("tkill")).unwrap();
    let daemons = |testbed: &Testbed| {
        let status = testbed.status();
        [status[0].daemon, status[1].daemon]
    };
    let before = daemons(&testbed);
    assert!(before.iter().all(Option::is_some));
    testbed.kill(&NODE1).unwrap();
    assert_eq!(daemons(&testbed), [None, before[1]]);
    let again = testbed.kill(&NODE1).unwrap_err();
    assert!(matches!(again, TestbedError::DaemonState { .. }), "{again}");
    testbed.start(&NODE1).unwrap();
    let after = daemons(&testbed);
    assert!(after[0].is_some() && after[0] != before[0] && after[1] == before[1]);
    let again = testbed.start(&NODE1).unwrap_err();
    assert!(matches!(again, TestbedError::DaemonState { .. }), "{again}");
}

#[test]
fn two_testbeds_stand_side_by_side_and_leave_nothing() {
    let (one, other) = ("tone", "tother");
    let first = TemporaryTestbed::up(&options(one)).unwrap();
    let second = TemporaryTestbed::up(&options(other)).unwrap();
    let again = TemporaryTestbed::up(&options(one)).unwrap_err();
    assert!(matches!(again, TestbedError::AlreadyUp { .. }), "{again}");
    // A command that would go on for ever, and one that has left its parent.
    let mut child = first.command(&NODE1, "sleep").arg("1000").spawn().unwrap();
    let script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!";
    let output = first.command(&Host::Client, "sh").args(["-c", script]).output().unwrap();
    let pid = String::from_utf8(output.stdout).unwrap();
    let orphan = PathBuf::from(format!("/proc/{}/exe", pid.trim()));
    assert!(orphan.read_link().is_ok());
    drop(first);
    assert!(child.wait().unwrap().code().is_none(), "it was killed");
    assert!(orphan.read_link().is_err());
    assert_eq!(residue(one), [""; 0]);
    assert!(reaches(other, &NODE1, &NODE2), "the other one stands");
    drop(second);
    assert_eq!(residue(other), [""; 0]);
}

#[test]
fn a_program_killed_while_it_builds_leaves_nothing_after_down() {
    let name = "tcrash";
    let program = env!("CARGO_BIN_EXE_testbed");
    for milliseconds in [1, 3, 6, 10, 15, 20, 30, 60] {
        let mut up = Command::new(program);
        up.args(["--name", name, "up", "--nodes", "3", "--no-cluster"]);
        let mut child = up.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // How far it got is what differs from round to round.
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        Testbed::remove(Path::new(DEFAULT_DIRECTORY), name).unwrap();
        // A daemon that was about to start finds its cgroup gone and ends by itself.
        let deadline = Instant::now() + Duration::from_secs(2);
        while !residue(name).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(residue(name), [""; 0], "killed after {milliseconds} ms");
    }
}

#[test]
fn a_command_keeps_its_input_output_and_status() {
    let name = "texec";
    let _testbed = TemporaryTestbed::up(&options(name)).unwrap();
    let run = |arguments: &[&str], input: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_testbed"));
        command.args(["--name", name]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let script = "cat; echo $VZD_SOCKET; command -v vzctl; exit 7";
    let (status, output, _) = run(&["exec", "node2", "--", "sh", "-c", script], "in\n");
    assert_eq!(status, Some(7));
    let directory = format!("{DEFAULT_DIRECTORY}/{name}");
    let expected = format!("in\n{directory}/node2/run/vzd.sock\n{directory}/bin/vzctl\n");
    assert_eq!(output, expected);
    let (status, output, _) = run(&["client", "--", "sh", "-c", "echo ${VZD_SOCKET-none}"], "");
    assert_eq!((status, output.as_str()), (Some(0), "none\n"));
    let (status, _, error) = run(&["exec", "node9", "--", "true"], "");
    assert_eq!(status, Some(1));
    assert!(error.contains("no host \"node9\"; it has node1, node2, client"), "{error}");
    let (status, _, error) = run(&["exec", "node1", "--", "/no/such/program"], "");
    assert_eq!(status, Some(1));
    assert!(error.contains("/no/such/program"), "{error}");
}
