//! What a user may forbid a move: to stand still for longer than this, to send more than that. And
//! what it does by itself to send less.

use std::process::Stdio;

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;
use serde_json::Value;

const VE: &str = "101";
const SOURCE: Host = Host::Node(1);
const TARGET: Host = Host::Node(2);
/// Bytes that no compression makes smaller.
const HEAVY: u64 = 48 << 20;

fn report(said: &str) -> Value {
    let last = said.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// The fastest round of a move, in bytes per second.
fn rate(report: &Value) -> f64 {
    let rounds = report["rounds"].as_array().expect("rounds");
    let rate = |round: &Value| {
        let (bytes, ms) = (round["bytes"].as_f64(), round["ms"].as_f64());
        bytes.expect("a number") / ms.expect("a number") * 1000.0
    };
    // One of a few kilobytes may be over before a limit is felt.
    let large = |round: &&Value| round["bytes"].as_u64() > Some(4 << 20);
    let fastest = rounds.iter().filter(large).map(rate).max_by(f64::total_cmp);
    fastest.expect("a large round")
}

#[test]
fn a_strict_move_over_its_budget_leaves_the_ve_where_it_is() {
    let scene = Scene::up("strict", 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    let alive = "echo yes > /run/alive; cat /proc/sys/kernel/random/boot_id";
    scene.inside(SOURCE, VE, alive).expect("the scene works");
    let words = ["vzmigrate", "--online", "--strict", "--max-downtime", "1", "node2", VE];
    let ran = scene.run(SOURCE, &words).expect("the scene works");
    assert_eq!(ran.code, Some(27), "{ran}");
    // What was accepted, what it would have been, and what helps.
    assert!(ran.stderr.contains("1 ms") && ran.stderr.contains("--max-downtime"), "{ran}");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [SOURCE]);
    assert_eq!(scene.inside(SOURCE, VE, "cat /run/alive").expect("it answers").trim(), "yes");
    let place = scene.testbed.node_directory(&TARGET).join("state/ve").join(VE);
    scene.wait("a clean target", 30, || Ok(!place.exists())).expect("nothing is left there");

    // Nobody who can wait is refused.
    let words = ["vzmigrate", "--online", "--strict", "--max-downtime", "60000", "node2", VE];
    scene.good(SOURCE, &words).expect("the move works");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
    assert_eq!(scene.inside(TARGET, VE, "cat /run/alive").expect("it answers").trim(), "yes");
}

#[test]
fn limits_of_the_bandwidth_are_kept_and_lifted() {
    const CLUSTER: f64 = 16.0 * 1048576.0;
    let scene = Scene::up("limits", 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    let heavy = format!("head -c {HEAVY} /dev/urandom > /root/heavy");
    scene.inside(SOURCE, VE, &heavy).expect("the scene works");

    // Said on one node, it holds for moves from every other.
    scene.good(TARGET, &["vzcluster", "bandwidth", "16M"]).expect("the scene works");
    let status = scene.good(SOURCE, &["vzcluster", "status", "--json"]).expect("it answers");
    assert_eq!(report(&status)["bandwidth"].as_f64(), Some(CLUSTER), "{status}");
    let words = ["vzmigrate", "--online", "--json", "node2", VE];
    let moved = report(&scene.good(SOURCE, &words).expect("the move works"));
    assert!(rate(&moved) < CLUSTER * 1.1, "{moved}");

    // The lower one counts.
    let words = ["vzmigrate", "--online", "--json", "--bwlimit", "8M", "node1", VE];
    let moved = report(&scene.good(TARGET, &words).expect("the move works"));
    assert!(rate(&moved) < CLUSTER / 2.0 * 1.1, "{moved}");

    // A move under way follows: with this limit it would take hours.
    scene.good(SOURCE, &["vzcluster", "bandwidth", "4K"]).expect("the scene works");
    let words = ["vzmigrate", "--online", "node2", VE];
    let mut tool = scene.start(SOURCE, &words, Stdio::null()).expect("the scene works");
    let place = scene.testbed.node_directory(&TARGET).join("state/ve").join(VE);
    scene.wait("a move under way", 60, || Ok(place.exists())).expect("it begins");
    scene.good(SOURCE, &["vzcluster", "bandwidth", "unlimited"]).expect("the scene works");
    assert!(tool.wait().expect("a child of ours").success());
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
    let status = scene.good(SOURCE, &["vzcluster", "status", "--json"]).expect("it answers");
    assert_eq!(report(&status)["bandwidth"], Value::Null, "{status}");
}

#[test]
fn a_slow_link_carries_what_can_be_compressed_in_less() {
    let mut scene = Scene::up("squeeze", 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    let text = format!("seq 10000000 | head -c {HEAVY} > /root/text; sha256sum /root/text");
    let before = scene.inside(SOURCE, VE, &text).expect("the scene works");
    scene.testbed.rate(&SOURCE, Some("100mbit".parse().expect("a rate"))).expect("it is set");
    let words = ["vzmigrate", "--online", "--json", "node2", VE];
    let moved = report(&scene.good(SOURCE, &words).expect("the move works"));
    assert!(moved["bytes"].as_u64().expect("a number") < HEAVY * 2 / 3, "{moved}");
    let after = scene.inside(TARGET, VE, "sha256sum /root/text").expect("it answers");
    assert_eq!(before, after);
}
