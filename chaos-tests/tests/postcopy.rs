//! VEs that write faster than their link takes are moved by post-copy: they run on the target
//! before all their memory is there, and notice nothing but that some of it is slow.

use std::process::{Child, Stdio};

use chaos_tests::client::remote::RemoteLoad;
use chaos_tests::scene::{Ran, Scene};
use chaos_tests::testbed::Host;
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";
const SOURCE: Host = Host::Node(1);
const TARGET: Host = Host::Node(2);
const MOVE: [&str; 5] = ["vzmigrate", "--online", "--postcopy", "--json", "node2"];
/// What writes in the VE: threads, and a process that forks. What that has in common with a child
/// cannot come later, so only without it is a budget met for certain.
const THREADS: &str = "flood";
const ALL: &str = "torrent,flood";

fn rate(scene: &mut Scene, rate: Option<&str>) {
    let rate = rate.map(|rate| rate.parse().expect("a rate"));
    scene.testbed.rate(&SOURCE, rate).expect("the scene works");
}

/// A VE whose programs write faster than its link takes, and check what they have written.
fn writing(name: &str, workloads: &str) -> (Scene, RemoteLoad) {
    let mut scene = Scene::up(name, 3).expect("the scene works");
    scene.make_ve(SOURCE, VE, ADDRESS).expect("the scene works");
    scene.open_redis(SOURCE, VE).expect("the scene works");
    let load = scene.load(ADDRESS, 4, 2).expect("the scene works");
    scene.put_selfcheck(SOURCE, VE).expect("the scene works");
    let line = format!("selfcheck run --detach --only {workloads}");
    scene.inside(SOURCE, VE, &line).expect("the scene works");
    rate(&mut scene, Some("200mbit"));
    (scene, load)
}

fn start_move(scene: &Scene) -> Child {
    let words: Vec<&str> = MOVE.iter().copied().chain([VE]).collect();
    scene.start(SOURCE, &words, Stdio::null()).expect("the scene works")
}

fn end(child: Child) -> Ran {
    Ran::end("vzmigrate", child).expect("a child of ours")
}

fn told(ran: &Ran) -> Value {
    let line = ran.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {ran}"))
}

/// What `vzlist` says is under way.
fn operation(scene: &Scene, node: Host) -> String {
    let words = ["vzlist", "-a", "--json", VE];
    let ran = scene.run(node, &words).expect("the scene works");
    let listed: Value = serde_json::from_str(&ran.stdout).unwrap_or(Value::Null);
    listed[0]["operation"].as_str().unwrap_or_default().to_owned()
}

/// Slows the link down as soon as the VE runs on the target, so that much is still to come, and
/// returns then.
fn catch(scene: &mut Scene) {
    let begun = || Ok(operation(scene, TARGET).starts_with("post-copy"));
    scene.wait("post-copy", 180, begun).expect("the scene works");
    rate(scene, Some("20mbit"));
    assert!(operation(scene, TARGET).starts_with("post-copy"), "it was over too soon");
    let alone = || Ok(scene.running_on(VE)? == [TARGET]);
    scene.wait("a source that knows", 5, alone).expect("it runs on one node");
}

/// All programs have what they wrote, no client has noticed anything, and nothing is left.
fn check(mut scene: Scene, load: RemoteLoad) {
    rate(&mut scene, None);
    let whole = || Ok(operation(&scene, TARGET).is_empty());
    scene.wait("all the memory", 120, whole).expect("the scene works");
    let directory = scene.testbed.node_directory(&SOURCE).join("state/ve").join(VE);
    scene.wait("a clean source", 30, || Ok(!directory.exists())).expect("nothing is left there");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
    scene.inside(TARGET, VE, "selfcheck status").expect("they run");
    // It can go on at once.
    scene
        .good(TARGET, &["vzmigrate", "--online", "--max-downtime", "60000", "node3", VE])
        .expect("it moves on");
    let verdicts = scene.inside(Host::Node(3), VE, "selfcheck verify");
    print!("{}", verdicts.expect("nothing is wrong in it"));
    let (report, _) = load.stop().expect("the scene works");
    assert!(report.is_clean(), "{:?}", report.complaints);
}

#[test]
fn a_ve_that_writes_too_fast_is_moved_by_post_copy_within_its_budget() {
    let (scene, load) = writing("postcopy", THREADS);
    let ran = end(start_move(&scene));
    assert_eq!(ran.code, Some(0), "{ran}");
    assert!(ran.stderr.contains("needs both hosts"), "{ran}");
    let told = told(&ran);
    println!("{}", ran.stdout);
    let number = |value: &Value| value.as_f64().expect("a number");
    assert!(number(&told["postcopy"]["pages"]) > 1000.0, "{told}");
    assert!(number(&told["postcopy"]["faults"]) > 0.0, "{told}");
    // At the rate of the link, what came later alone would have taken more.
    let (down, later) = (number(&told["downtime_ms"]["total"]), number(&told["postcopy"]["bytes"]));
    assert!(down < later / 25_000.0, "{told}");
    check(scene, load);
}

#[test]
fn with_pages_missing_a_ve_can_be_stopped_but_not_moved_or_suspended() {
    let (mut scene, load) = writing("busy", ALL);
    let tool = start_move(&scene);
    catch(&mut scene);
    for (words, code) in [
        (&["vzmigrate", "node3", VE][..], 20),
        (&["vzctl", "suspend", VE], 9),
        (&["vzctl", "chkpnt", VE, "--dumpfile", "/tmp/never"], 9),
    ] {
        let ran = scene.run(TARGET, words).expect("the scene works");
        assert_eq!(ran.code, Some(code), "{ran}");
        assert!(ran.stderr.contains("MiB of its memory are still to come"), "{ran}");
    }
    scene.inside(TARGET, VE, "echo it answers").expect("the VE runs");
    drop(load.stop());
    scene.good(TARGET, &["vzctl", "stop", VE, "--fast"]).expect("it can be stopped");
    let ran = end(tool);
    assert_eq!(ran.code, Some(0), "{ran}");
    assert!(ran.stderr.contains("ended on node2 before all its memory had come"), "{ran}");
    let directory = scene.testbed.node_directory(&SOURCE).join("state/ve").join(VE);
    scene.wait("a clean source", 30, || Ok(!directory.exists())).expect("nothing is left there");
    scene.good(TARGET, &["vzctl", "start", VE, "--wait"]).expect("it can be started again");
}

#[test]
fn a_source_whose_daemon_dies_in_post_copy_goes_on_when_it_is_back() {
    let (mut scene, load) = writing("pcsource", ALL);
    let tool = start_move(&scene);
    catch(&mut scene);
    scene.testbed.kill(&SOURCE).expect("the scene works");
    drop(end(tool));
    let waits = operation(&scene, TARGET);
    assert!(waits.starts_with("post-copy"), "{waits}");
    scene.testbed.start(&SOURCE).expect("the scene works");
    check(scene, load);
}

#[test]
fn a_target_whose_daemon_dies_in_post_copy_goes_on_when_it_is_back() {
    let (mut scene, load) = writing("pctarget", ALL);
    let tool = start_move(&scene);
    catch(&mut scene);
    scene.testbed.kill(&TARGET).expect("the scene works");
    scene.testbed.start(&TARGET).expect("the scene works");
    rate(&mut scene, None);
    let ran = end(tool);
    assert_eq!(ran.code, Some(0), "{ran}");
    check(scene, load);
}

#[test]
fn a_ve_whose_source_has_lost_its_memory_is_ended() {
    let (mut scene, load) = writing("pclost", ALL);
    let tool = start_move(&scene);
    catch(&mut scene);
    scene.testbed.kill(&SOURCE).expect("the scene works");
    drop(end(tool));
    // As after a reboot: the daemon comes back, the processes do not.
    let copy = chaos_tests::scene::cgroup::VeCgroups::of(&scene, SOURCE, VE).expect("its cgroups");
    copy.kill().expect("the frozen copy ends");
    scene.testbed.start(&SOURCE).expect("the scene works");
    let ended = || Ok(scene.running_on(VE)?.is_empty());
    scene.wait("the end of the VE", 30, ended).expect("it does not run on without its memory");
    let log = std::fs::read_to_string(scene.testbed.log(&TARGET)).expect("a log");
    assert!(log.contains("VE 101 is ended"), "the log does not say why");
    drop(load.stop());
    rate(&mut scene, None);
    let free = || Ok(scene.run(TARGET, &["vzctl", "start", VE, "--wait"])?.code == Some(0));
    scene.wait("a new start", 60, free).expect("its files are there");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
}

/// The keepers that a node's daemon has started.
fn keepers(scene: &Scene, node: Host) -> Vec<i32> {
    let hosts = scene.testbed.status();
    let daemon = hosts.iter().find(|host| host.host == node.to_string());
    let daemon = daemon.and_then(|host| host.daemon).expect("a daemon");
    let is_keeper = |pid: &i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').nth(1) == Some("page-keeper")
    };
    children(daemon).into_iter().filter(is_keeper).collect()
}

/// The processes that the threads of a process have started.
fn children(process: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
    let lists = tasks.flatten().map(|task| task.path().join("children"));
    let lists: Vec<String> = lists.filter_map(|list| std::fs::read_to_string(list).ok()).collect();
    lists.iter().flat_map(|list| list.split_whitespace()).flat_map(str::parse).collect()
}

#[test]
fn a_ve_whose_keeper_is_killed_is_ended() {
    let (mut scene, load) = writing("pckeeper", ALL);
    let tool = start_move(&scene);
    catch(&mut scene);
    let found = keepers(&scene, TARGET);
    assert_eq!(found.len(), 1, "{found:?}");
    let killed = nix::unistd::Pid::from_raw(found[0]);
    nix::sys::signal::kill(killed, nix::sys::signal::Signal::SIGKILL).expect("it lives");
    let ended = || Ok(scene.running_on(VE)?.is_empty());
    scene.wait("the end of the VE", 10, ended).expect("it does not run on without its memory");
    let log = std::fs::read_to_string(scene.testbed.log(&TARGET)).expect("a log");
    assert!(log.contains("the keeper of its memory has died"), "the log does not say why");
    drop(load.stop());
    let ran = end(tool);
    assert_eq!(ran.code, Some(0), "{ran}");
    scene.good(TARGET, &["vzctl", "start", VE, "--wait"]).expect("it can be started again");
}
