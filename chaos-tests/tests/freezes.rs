//! VEs that write faster than they can be copied, and daemons that die or hang while a VE stands
//! still: the VE goes on by itself, with its own limits.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chaos_tests::client::remote::RemoteLoad;
use chaos_tests::scene::Scene;
use chaos_tests::scene::cgroup::VeCgroups;
use chaos_tests::testbed::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";
const SOURCE: Host = Host::Node(1);
const TARGET: Host = Host::Node(2);

/// Starts a program in the VE that writes to so many pages in turn, with so much work between two.
/// No compression makes the pages smaller.
fn start_writer(scene: &Scene, pages: u32, work: u32) {
    let program = format!(
        "open(my $f, \"<\", \"/dev/urandom\"); read($f, my $b, {pages} * 4096); my $i = 0; \
         while (1) {{ for (my $j = 0; $j < {work}; $j++) {{}} \
         substr($b, ($i % {pages}) * 4096, 1) = chr(65 + $i % 26); $i++ }}"
    );
    let line = format!("setsid perl -e '{program}' < /dev/null > /dev/null 2>&1 &");
    scene.inside(SOURCE, VE, &line).expect("the scene works");
}

fn limit_link(scene: &mut Scene, rate: &str) {
    let rate = rate.parse().expect("a rate");
    scene.testbed.rate(&SOURCE, Some(rate)).expect("the scene works");
}

/// A VE that writes faster than its link takes, with a CPU limit of its own.
fn writing(name: &str) -> Scene {
    let mut scene = Scene::up(name, 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, ADDRESS).expect("the scene works");
    let limit = ["vzctl", "set", VE, "--cpulimit", "150", "--save"];
    scene.good(SOURCE, &limit).expect("the scene works");
    start_writer(&scene, 5000, 3000);
    limit_link(&mut scene, "100mbit");
    scene
}

#[test]
fn a_ve_that_writes_too_fast_is_slowed_down_and_gets_its_limit_back() {
    let mut scene = writing("brake");
    let cgroups = VeCgroups::of(&scene, SOURCE, VE).expect("the scene works");
    assert_eq!(cgroups.cpu_percent(), Some(150));
    let words = ["vzmigrate", "--online", "node2", VE];
    let mut tool = scene.start(SOURCE, &words, Stdio::null()).expect("the scene works");
    let slowed = || Ok(cgroups.cpu_percent().is_some_and(|percent| percent < 150));
    scene.wait("a VE that is slowed down", 120, slowed).expect("the scene works");
    scene.testbed.kill(&SOURCE).expect("the scene works");
    tool.wait().expect("the scene works");
    // No daemon is there to do it.
    let restored = || Ok(cgroups.cpu_percent() == Some(150));
    scene.wait("the VE's own limit", 5, restored).expect("the scene works");
    scene.testbed.start(&SOURCE).expect("the scene works");

    let words = ["vzmigrate", "--online", "--json", "node2", VE];
    let ran = scene.run(SOURCE, &words).expect("the scene works");
    assert!(ran.stderr.contains("it is left 50 % of its CPU time"), "{ran}");
    let told: Value = serde_json::from_str(ran.stdout.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {ran}"));
    let rounds = told["rounds"].as_array().expect("rounds");
    let slowed = rounds.iter().filter(|round| round["throttle_percent"].is_u64());
    let bytes = |round: &Value| round["bytes"].as_u64().expect("a number");
    let last = rounds.last().map(bytes).expect("a round");
    assert!(slowed.count() > 0, "{told}");
    assert!(last < rounds.first().map(bytes).expect("a round") / 4, "{told}");
    println!("predicted {} came out {}", told["predicted_downtime_ms"], told["downtime_ms"]);
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
    let cgroups = VeCgroups::of(&scene, TARGET, VE).expect("the scene works");
    assert_eq!(cgroups.cpu_percent(), Some(150));
}

/// A VE with clients that stands still for long enough to be caught doing so.
fn standing_still(name: &str) -> (Scene, RemoteLoad, Child, VeCgroups) {
    let mut scene = Scene::up(name, 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, ADDRESS).expect("the scene works");
    scene.open_redis(SOURCE, VE).expect("the scene works");
    let load = scene.load(ADDRESS, 1, 2).expect("the scene works");
    start_writer(&scene, 1500, 0);
    limit_link(&mut scene, "50mbit");
    let cgroups = VeCgroups::of(&scene, SOURCE, VE).expect("the scene works");
    let words = ["vzmigrate", "--online", "--max-downtime", "60000", "node2", VE];
    let tool = scene.start(SOURCE, &words, Stdio::null()).expect("the scene works");
    let end = Instant::now() + Duration::from_secs(120);
    while !cgroups.is_frozen() {
        assert!(Instant::now() < end, "the VE was never frozen");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    (scene, load, tool, cgroups)
}

/// What the links of a daemon's host have sent so far.
fn bytes_sent(daemon: i32) -> u64 {
    let links = std::fs::read_to_string(format!("/proc/{daemon}/net/dev")).expect("the links");
    let sent = |line: &str| line.split_once(':')?.1.split_whitespace().nth(8)?.parse::<u64>().ok();
    links.lines().filter_map(sent).sum()
}

/// How long it takes until clients get answers.
fn until_answered(load: &mut RemoteLoad) -> Duration {
    let start = Instant::now();
    load.mark("before").expect("the scene works");
    while load.mark("now").expect("the scene works").requests == 0 {
        assert!(start.elapsed() < Duration::from_secs(30), "no client gets an answer");
        std::thread::park_timeout(Duration::from_millis(10));
    }
    start.elapsed()
}

fn end(mut scene: Scene, load: RemoteLoad) {
    scene.testbed.rate(&SOURCE, None).expect("the scene works");
    // The target has its half of a copy until it has noticed.
    let alone = || Ok(scene.running_on(VE)? == [SOURCE]);
    scene.wait("the VE on its source alone", 30, alone).expect("the scene works");
    scene.good(SOURCE, &["vzmigrate", "--online", "node2", VE]).expect("the scene works");
    let (report, _) = load.stop().expect("the scene works");
    assert!(report.is_clean(), "{:?}", report.complaints);
}

#[test]
fn a_daemon_that_dies_in_a_freeze_does_not_keep_its_ve_frozen() {
    let (mut scene, mut load, mut tool, cgroups) = standing_still("dies");
    scene.testbed.kill(&SOURCE).expect("the scene works");
    let answered = until_answered(&mut load);
    println!("clients went on {} ms after the kill", answered.as_millis());
    assert!(!cgroups.is_frozen());
    assert!(answered < Duration::from_secs(2), "clients waited {answered:?}");
    tool.wait().expect("the scene works");
    scene.testbed.start(&SOURCE).expect("the scene works");
    end(scene, load);
}

#[test]
fn a_daemon_that_hangs_in_a_freeze_does_not_keep_its_ve_frozen() {
    let (scene, mut load, mut tool, cgroups) = standing_still("hangs");
    let hosts = scene.testbed.status();
    let daemon = hosts.iter().find(|host| host.host == SOURCE.to_string());
    let daemon = daemon.and_then(|host| host.daemon).expect("a daemon");
    // When the last memory is on its way: connections are read before it, and see
    // docs/concepts/ownership.md for a daemon that hangs while it reads them.
    let (start, sent) = (Instant::now(), bytes_sent(daemon));
    while bytes_sent(daemon) < sent + 500_000 {
        assert!(start.elapsed() < Duration::from_secs(10), "no memory is sent");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    let daemon = Pid::from_raw(daemon);
    kill(daemon, Signal::SIGSTOP).expect("the daemon can be stopped");
    let answered = until_answered(&mut load);
    println!("clients went on {} ms after the stop", answered.as_millis());
    kill(daemon, Signal::SIGCONT).expect("the daemon can go on");
    let status = tool.wait().expect("the scene works");
    assert!(!status.success(), "what its watchdog has let go on was moved");
    assert!(!cgroups.is_frozen());
    end(scene, load);
}
