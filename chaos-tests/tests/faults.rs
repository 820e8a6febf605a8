//! Daemons that die during a move: the VE runs on exactly one node soon after, its clients go on,
//! and the next move works.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chaos_tests::scene::{Ran, Scene};
use chaos_tests::testbed::{DEFAULT_DIRECTORY, Host};
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// A cluster with a busy redis on its first node.
fn busy(name: &str) -> (Scene, chaos_tests::client::remote::RemoteLoad) {
    let scene = Scene::up(name, 3).expect("the scene works");
    scene.make_ve(Host::Node(1), VE, ADDRESS).expect("the scene works");
    scene.open_redis(Host::Node(1), VE).expect("the scene works");
    let load = scene.load(ADDRESS, 64, 2).expect("the scene works");
    (scene, load)
}

/// Kills a daemon at different moments of moves from the first node to the second, and checks
/// after each that the world is in order.
fn kill_during_moves(name: &str, victim: impl Fn(&Scene) -> Host) {
    let (mut scene, mut load) = busy(name);
    let (source, target) = (Host::Node(1), Host::Node(2));
    for delay_ms in [50, 150, 300, 500] {
        let place = only_place(&scene);
        if place != source {
            move_to(&scene, place, source);
        }
        let victim = victim(&scene);
        let to = target.to_string();
        let words = ["vzmigrate", "--online", &to, VE];
        let mut tool = scene.start(source, &words, Stdio::null()).expect("the scene works");
        let end = Instant::now() + Duration::from_millis(delay_ms);
        while Instant::now() < end && tool.try_wait().expect("the scene works").is_none() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        kill_and_settle(&mut scene, &victim, tool, &format!("{victim} killed after {delay_ms} ms"));
        let report =
            load.mark(&format!("{victim} killed after {delay_ms} ms")).expect("the scene works");
        assert!(report.is_clean(), "{}: {:?}", report.name, report.complaints);
        assert!(report.requests > 0, "{}: no request", report.name);
    }
    let place = only_place(&scene);
    move_to(&scene, place, if place == target { source } else { target });
    assert_eq!(load.verify().expect("the scene works").wrong, 0);
    let (report, _) = load.stop().expect("the scene works");
    assert!(report.is_clean(), "{:?}", report.complaints);
}

/// Kills a daemon while a move to the second node goes on, and starts it again once the move has
/// ended. A move that does not end without it must say what it waits for.
fn kill_and_settle(scene: &mut Scene, victim: &Host, mut tool: Child, name: &str) {
    scene.testbed.kill(victim).expect("the scene works");
    let settled = ends_within(scene, &mut tool, 12);
    scene.testbed.start(victim).expect("the scene works");
    if !settled {
        // Killed between the entry in the log and the word that the VE runs: only the target can
        // say whose it is, and must be there for that.
        assert!(ends_within(scene, &mut tool, 60), "{name}: the move does not end");
        let ran = Ran::end("vzmigrate", tool).expect("the scene works");
        assert!(ran.stderr.contains("may have been taken over by node2"), "{name}: {ran}");
        println!("{name}, in the switch: {ran}");
    }
    let one = || Ok(scene.running_on(VE)?.len() == 1);
    scene.wait("one place for the VE", 30, one).expect("the scene works");
}

/// Whether a move ends within so many seconds, well or not.
fn ends_within(scene: &Scene, tool: &mut Child, seconds: u64) -> bool {
    let ended = || Ok(tool.try_wait().expect("a child of ours").is_some());
    scene.wait("the end of a move", seconds, ended).is_ok()
}

/// The very next move, asked for at once, works.
fn move_to(scene: &Scene, source: Host, target: Host) {
    let words = ["vzmigrate", "--online", &target.to_string(), VE];
    scene.good(source, &words).expect("the scene works");
}

fn only_place(scene: &Scene) -> Host {
    let places = scene.running_on(VE).expect("the scene works");
    assert_eq!(places.len(), 1, "the VE runs on {places:?}");
    places[0]
}

/// From the seal on only the log knows whose the VE is, and the source must not take an end for
/// another one.
fn kill_in_the_switch(name: &str, victim: Host) {
    let (mut scene, mut load) = busy(name);
    let source = Host::Node(1);
    let journal =
        format!("{DEFAULT_DIRECTORY}/{}/{source}/state/ve/{VE}/migration.json", scene.name());
    let mut undone = 0;
    for late_us in [0, 500, 1000, 3000] {
        let place = only_place(&scene);
        if place != source {
            move_to(&scene, place, source);
        }
        let words = ["vzmigrate", "--online", "node2", VE];
        let mut tool = scene.start(source, &words, Stdio::null()).expect("the scene works");
        let is_sealed =
            || std::fs::read_to_string(&journal).is_ok_and(|text| text.contains("\"sealed\""));
        while !is_sealed() && tool.try_wait().expect("a child of ours").is_none() {
            std::thread::park_timeout(Duration::from_micros(50));
        }
        std::thread::park_timeout(Duration::from_micros(late_us));
        let name = format!("{victim} killed {late_us} µs after the seal");
        kill_and_settle(&mut scene, &victim, tool, &name);
        undone += u32::from(only_place(&scene) == source);
        // The VE stands still until the log has spoken, which may first have to elect a leader.
        let answered = || {
            let report = load.mark(&name).expect("the scene works");
            assert!(report.is_clean(), "{name}: {:?}", report.complaints);
            Ok(report.requests > 0)
        };
        scene.wait("an answer", 30, answered).expect("the scene works");
    }
    println!("{undone} of 4 moves were undone");
    assert_eq!(load.verify().expect("the scene works").wrong, 0);
    let (report, _) = load.stop().expect("the scene works");
    assert!(report.is_clean(), "{:?}", report.complaints);
}

#[test]
fn the_daemon_of_the_target_dies() {
    kill_during_moves("deadtgt", |_| Host::Node(2));
}

#[test]
fn the_daemon_of_the_target_dies_in_the_switch() {
    kill_in_the_switch("deadswt", Host::Node(2));
}

#[test]
fn the_daemon_of_the_source_dies_in_the_switch() {
    kill_in_the_switch("deadsws", Host::Node(1));
}

#[test]
fn the_daemon_of_the_source_dies() {
    kill_during_moves("deadsrc", |_| Host::Node(1));
}

#[test]
fn the_leader_dies() {
    kill_during_moves("deadlead", |scene| {
        let mut leader = None;
        let elected = || {
            let status = scene.good(Host::Node(1), &["vzcluster", "status", "--json"])?;
            let status: Value = serde_json::from_str(&status).expect("JSON");
            leader = status["leader"].as_str().map(str::to_owned);
            Ok(leader.is_some())
        };
        scene.wait("a leader", 30, elected).expect("the scene works");
        let leader = &leader.expect("a leader");
        scene.testbed.host(leader).expect("a node of the testbed")
    });
}
