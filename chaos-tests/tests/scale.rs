//! Very many of one thing in a VE: it moves all the same, there and back.

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// Moves a VE with this workload to the other node and back; all must be there afterwards.
fn move_with(scene: &str, workload: &str) {
    let scene = Scene::up(scene, 2).expect("the scene works");
    let (one, two) = (Host::Node(1), Host::Node(2));
    scene.make_ve(one, VE, ADDRESS).expect("the scene works");
    scene.put_selfcheck(one, VE).expect("the scene works");
    scene
        .inside(one, VE, &format!("selfcheck run --detach --only {workload}"))
        .expect("the scene works");
    for (from, to) in [(one, two), (two, one)] {
        let there = to.to_string();
        let told = scene.good(from, &["vzmigrate", &there, VE, "--max-downtime", "20000"]);
        assert!(told.is_ok(), "{}", told.expect_err("it failed"));
        scene.inside(to, VE, "selfcheck status").expect("the scene works");
    }
    let table = scene.inside(one, VE, "selfcheck verify");
    assert!(table.is_ok(), "{}", table.expect_err("it failed"));
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
