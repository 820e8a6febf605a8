//! Very many of one thing in a VE: it moves all the same, there and back.

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// Moves a VE with this workload to the other node and back; all must be there afterwards. Returns
/// how many MiB were sent each time beside the program of the workload, which lies in the VE.
fn move_with(scene: &str, workload: &str) -> Vec<f64> {
    let mut sent = Vec::new();
    let scene = Scene::up(scene, 2).expect("the scene works");
    let (one, two) = (Host::Node(1), Host::Node(2));
    scene.make_ve(one, VE, ADDRESS).expect("the scene works");
    scene.put_selfcheck(one, VE).expect("the scene works");
    let program = std::fs::metadata(scene.program("selfcheck")).expect("it is built").len();
    scene
        .inside(one, VE, &format!("selfcheck run --detach --only {workload}"))
        .expect("the scene works");
    for (from, to) in [(one, two), (two, one)] {
        let there = to.to_string();
        let words = ["vzmigrate", "--json", &there, VE, "--max-downtime", "20000"];
        let told = scene.good(from, &words);
        let told = told.unwrap_or_else(|error| panic!("it failed: {error}"));
        let report: Value = serde_json::from_str(told.lines().last().unwrap_or_default())
            .unwrap_or_else(|error| panic!("{told:?} is no JSON: {error}"));
        let bytes = report["bytes"].as_f64().expect("a number") - program as f64;
        sent.push(bytes / f64::from(1 << 20));
        scene.inside(to, VE, "selfcheck status").expect("the scene works");
    }
    let table = scene.inside(one, VE, "selfcheck verify");
    assert!(table.is_ok(), "{}", table.expect_err("it failed"));
    sent
}

#[test]
fn a_tree_of_a_thousand_processes_moves() {
    move_with("manyproc", "many-processes");
}

#[test]
fn a_process_of_a_thousand_threads_moves() {
    move_with("manythr", "many-threads");
}

#[test]
fn a_process_of_fifty_thousand_areas_moves() {
    move_with("manyarea", "many-areas");
}

#[test]
fn a_process_of_two_thousand_connections_moves() {
    move_with("manyconn", "many-connections");
}

#[test]
fn a_process_of_ten_thousand_files_moves() {
    move_with("manyfile", "many-files");
}

#[test]
fn what_eight_processes_have_alike_is_sent_once() {
    // Each of them has 32 MiB; the rest is what else there is in a VE.
    let sent = move_with("manycopy", "many-copies");
    println!("MiB sent: {sent:?}");
    assert!(sent.iter().all(|&mib| mib < 56.0), "{sent:?}");
}
