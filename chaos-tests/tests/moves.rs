//! Moves of busy VEs round a cluster: what clients see, what the VE itself sees, and what is left.

use chaos_tests::client::report::Report;
use chaos_tests::scene::traces::Traces;
use chaos_tests::scene::{Scene, SceneError};
use chaos_tests::testbed::Host;
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// Moves the VE and returns the object that `vzmigrate --json` ends with.
fn move_to(scene: &Scene, source: Host, target: Host) -> Result<Value, SceneError> {
    let target = target.to_string();
    let said = scene.good(source, &["vzmigrate", "--online", "--json", &target, VE])?;
    let line = said.lines().last().unwrap_or_default();
    Ok(serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is no JSON: {error}")))
}

fn assert_clean(report: &Report) {
    assert!(report.is_clean(), "{:?}", report.complaints);
    let timeouts = report.counters.get("TCPTimeouts").copied().unwrap_or(0);
    assert_eq!(timeouts, 0, "retransmission timeouts: {:?}", report.counters);
    assert_eq!(report.counters.get("EstabResets"), None);
}

#[test]
fn a_busy_redis_goes_round_without_one_failed_request() {
    let scene = Scene::up("round", 3).unwrap();
    let nodes = scene.testbed.nodes();
    let untouched = Traces::of(&scene, nodes[1]);
    scene.make_ve(nodes[0], VE, ADDRESS).unwrap();
    scene.open_redis(nodes[0], VE).unwrap();
    let mut load = scene.load(ADDRESS, 64, 4).unwrap();
    load.mark("start").unwrap();
    let mut stalls = Vec::new();
    for turn in 0..6 {
        let (source, target) = (nodes[turn % 3], nodes[(turn + 1) % 3]);
        let told = move_to(&scene, source, target).unwrap();
        assert_eq!(scene.running_on(VE).unwrap(), [target]);
        let report = load.mark("move").unwrap();
        assert_clean(&report);
        assert!(report.requests > 0);
        let downtime = told["downtime_ms"]["total"].as_f64().unwrap();
        assert!(downtime > 0.0 && told["rounds"].as_array().is_some_and(|r| !r.is_empty()));
        assert!(
            report.longest_stall_ms + 5.0 >= downtime * 0.8,
            "told {downtime} ms, measured {} ms",
            report.longest_stall_ms
        );
        stalls.push(report.longest_stall_ms);
    }
    assert_eq!(load.verify().unwrap().wrong, 0);
    let (report, status) = load.stop().unwrap();
    assert_clean(&report);
    assert!(status.success());
    stalls.sort_by(f64::total_cmp);
    assert!(stalls[3] < 250.0, "stalls in ms: {stalls:?}");
    // The VE is on the first node again and has been on the second twice.
    let left = Traces::of(&scene, nodes[1]).beyond(&untouched);
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn self_checking_workloads_pass_after_moves() {
    let scene = Scene::up("check", 2).unwrap();
    let (one, two) = (Host::Node(1), Host::Node(2));
    scene.make_ve(one, VE, ADDRESS).unwrap();
    let _companion = scene.start_selfcheck(one, VE).unwrap();
    let mut places = [one, two];
    for turn in 1..=20 {
        move_to(&scene, places[0], places[1]).unwrap();
        places.swap(0, 1);
        let status = scene.inside(places[0], VE, "selfcheck status");
        assert!(status.is_ok(), "after move {turn}: {}", status.unwrap_err());
    }
    let table = scene.inside(places[0], VE, "selfcheck verify");
    assert!(table.is_ok(), "{}", table.unwrap_err());
}
