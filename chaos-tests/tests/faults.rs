//! Daemons that die during a move: the VE runs on exactly one node soon after, its clients go on,
//! and the next move works.

use std::process::Stdio;
use std::time::{Duration, Instant};

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;
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
        scene.testbed.kill(&victim).expect("the scene works");
        tool.wait().expect("the scene works");
        scene.testbed.start(&victim).expect("the scene works");
        scene
            .wait("one place for the VE", 30, || Ok(scene.running_on(VE)?.len() == 1))
            .expect("the scene works");
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

#[test]
fn the_daemon_of_the_target_dies() {
    kill_during_moves("deadtgt", |_| Host::Node(2));
}

#[test]
fn the_daemon_of_the_source_dies() {
    kill_during_moves("deadsrc", |_| Host::Node(1));
}

#[test]
fn the_leader_dies() {
    kill_during_moves("deadlead", |scene| {
        let status = scene.good(Host::Node(1), &["vzcluster", "status", "--json"]);
        let status: Value = serde_json::from_str(&status.expect("the scene works")).expect("JSON");
        let leader = status["leader"].as_str().expect("a leader");
        scene.testbed.host(leader).expect("a node of the testbed")
    });
}
