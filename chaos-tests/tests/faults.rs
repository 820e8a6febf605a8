//! Daemons that die during a move: the VE runs on exactly one node soon after, its clients go on,
//! and the next move works.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chaos_tests::client::remote::RemoteLoad;
use chaos_tests::scene::{Ran, Scene};
use chaos_tests::testbed::{DEFAULT_DIRECTORY, Host};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// A cluster with a busy redis on its first node.
fn busy(name: &str) -> (Scene, RemoteLoad) {
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
        let name = format!("{victim} killed after {delay_ms} ms");
        kill_and_settle(&mut scene, &victim, tool, &name);
        until_answered(&scene, &mut load, &name);
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
    only_place(scene);
}

/// Returns when the source of a move has written down that only the log knows whose the VE is, or
/// the move has ended.
fn until_sealed(scene: &Scene, source: Host, tool: &mut Child) {
    let journal =
        format!("{DEFAULT_DIRECTORY}/{}/{source}/state/ve/{VE}/migration.json", scene.name());
    let is_sealed =
        || std::fs::read_to_string(&journal).is_ok_and(|text| text.contains("\"sealed\""));
    while !is_sealed() && tool.try_wait().expect("a child of ours").is_none() {
        std::thread::park_timeout(Duration::from_micros(50));
    }
}

/// Waits until clients get answers, and checks that they were right all the time. The VE stands
/// still until the log has spoken, which may first have to elect a leader.
fn until_answered(scene: &Scene, load: &mut RemoteLoad, name: &str) {
    let before = load.mark("until now").expect("the scene works");
    assert!(before.is_clean(), "{name}: {:?}", before.complaints);
    let answered = || {
        let report = load.mark(name).expect("the scene works");
        assert!(report.is_clean(), "{name}: {:?}", report.complaints);
        Ok(report.requests > 0)
    };
    scene.wait("an answer", 60, answered).expect("the scene works");
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

/// Where the VE is, which may have to be found out by the log first.
fn only_place(scene: &Scene) -> Host {
    let mut places = Vec::new();
    let one = || {
        places = scene.running_on(VE)?;
        Ok(places.len() == 1)
    };
    if let Err(error) = scene.wait("one place for the VE", 30, one) {
        panic!("the VE runs on {places:?}: {error}");
    }
    places[0]
}

/// From the seal on only the log knows whose the VE is, and the source must not take an end for
/// another one.
fn kill_in_the_switch(name: &str, victim: Host) {
    let (mut scene, mut load) = busy(name);
    let source = Host::Node(1);
    let mut undone = 0;
    for late_us in [0, 500, 1000, 3000] {
        let place = only_place(&scene);
        if place != source {
            move_to(&scene, place, source);
        }
        let words = ["vzmigrate", "--online", "node2", VE];
        let mut tool = scene.start(source, &words, Stdio::null()).expect("the scene works");
        until_sealed(&scene, source, &mut tool);
        std::thread::park_timeout(Duration::from_micros(late_us));
        let name = format!("{victim} killed {late_us} µs after the seal");
        kill_and_settle(&mut scene, &victim, tool, &name);
        undone += u32::from(only_place(&scene) == source);
        until_answered(&scene, &mut load, &name);
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

/// Any daemons die at any moment, also several at once, and come back at any other. `FERRY_SEED`
/// repeats a run, as far as the moments go; `FERRY_MOVES` makes it longer.
#[test]
fn daemons_that_die_at_random_leave_one_ve() {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = setting("FERRY_SEED").unwrap_or_else(rand::random);
    println!("FERRY_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut scene, mut load) = busy("deadany");
    for round in 1..=setting("FERRY_MOVES").unwrap_or(8) {
        let source = only_place(&scene);
        let others: Vec<Host> =
            scene.testbed.nodes().into_iter().filter(|node| *node != source).collect();
        let target = others[random.random_range(0..others.len())];
        let words = ["vzmigrate", "--online", &target.to_string(), VE];
        let mut tool = scene.start(source, &words, Stdio::null()).expect("the scene works");
        let in_switch = random.random_bool(0.7);
        if in_switch {
            until_sealed(&scene, source, &mut tool);
        }
        let late =
            Duration::from_micros(random.random_range(0..if in_switch { 8000 } else { 500_000 }));
        std::thread::park_timeout(late);
        let mut victims = scene.testbed.nodes();
        victims.shuffle(&mut random);
        victims.truncate(random.random_range(1..=3));
        for victim in &victims {
            scene.testbed.kill(victim).expect("the scene works");
        }
        let away = Duration::from_millis(random.random_range(0..1500));
        std::thread::park_timeout(away);
        for victim in &victims {
            scene.testbed.start(victim).expect("the scene works");
        }
        let name = format!(
            "round {round}: {victims:?} killed {late:?} after {} of a move from {source} to \
             {target}, started after {away:?}",
            if in_switch { "the seal" } else { "the beginning" }
        );
        println!("{name}");
        assert!(ends_within(&scene, &mut tool, 60), "{name}: the move does not end");
        until_answered(&scene, &mut load, &name);
    }
    assert_eq!(load.verify().expect("the scene works").wrong, 0);
    let (report, _) = load.stop().expect("the scene works");
    assert!(report.is_clean(), "{:?}", report.complaints);
}
