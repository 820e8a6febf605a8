//! Moves that cannot be completed: the user is told why, the VE runs on where it was, nothing is
//! left at the target, and the next move works.

use std::process::{Child, Stdio};

use chaos_tests::scene::{Ran, Scene};
use chaos_tests::testbed::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const VE: &str = "101";
const SOURCE: Host = Host::Node(1);
const TARGET: Host = Host::Node(2);

fn end(child: Child) -> Ran {
    Ran::end("vzmigrate", child).expect("a child of ours")
}

/// What a node keeps of the VE.
fn directory(scene: &Scene, node: Host) -> std::path::PathBuf {
    scene.testbed.node_directory(&node).join("state/ve").join(VE)
}

/// Starts a move over a slow link and returns when the target is taking the VE in.
fn slow_move(scene: &mut Scene, source: Host, target: Host) -> Child {
    scene.testbed.rate(&source, Some("10mbit".parse().expect("a rate"))).expect("the scene works");
    let words = ["vzmigrate", "--online", &target.to_string(), VE];
    let tool = scene.start(source, &words, Stdio::null()).expect("the scene works");
    let arriving = directory(scene, target);
    let begun = scene.wait("the VE's place at the target", 60, || Ok(arriving.exists()));
    begun.expect("the scene works");
    tool
}

/// After a move that did not happen: all is as before, and a move works at once.
fn stays_and_can_move(scene: &mut Scene) {
    assert_eq!(scene.running_on(VE).expect("the scene works"), [SOURCE]);
    assert_eq!(scene.inside(SOURCE, VE, "cat /run/alive").expect("it answers").trim(), "yes");
    scene.testbed.rate(&SOURCE, None).expect("the scene works");
    let target = TARGET.to_string();
    scene.good(SOURCE, &["vzmigrate", "--online", &target, VE]).expect("the next move works");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
    assert_eq!(scene.inside(TARGET, VE, "cat /run/alive").expect("it answers").trim(), "yes");
    assert!(!directory(scene, SOURCE).exists(), "something is left at the source");
}

/// A VE with 64 MiB that no compression makes smaller, in a file of its own.
fn make_heavy_ve(scene: &Scene) {
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    let line = "echo yes > /run/alive; head -c 64M /dev/urandom > /root/heavy";
    scene.inside(SOURCE, VE, line).expect("the scene works");
}

#[test]
fn ctrl_c_calls_a_move_off() {
    let mut scene = Scene::up("ctrlc", 2).expect("the scene works");
    make_heavy_ve(&scene);
    let tool = slow_move(&mut scene, SOURCE, TARGET);
    kill(Pid::from_raw(tool.id().cast_signed()), Signal::SIGINT).expect("it runs");
    let ran = end(tool);
    assert_eq!(ran.code, Some(25), "{ran}");
    assert!(ran.stderr.contains("the VE runs on here"), "{ran}");
    let arriving = directory(&scene, TARGET);
    scene.wait("a clean target", 30, || Ok(!arriving.exists())).expect("nothing is left there");
    stays_and_can_move(&mut scene);
}

#[test]
fn a_second_operation_is_refused_while_a_move_is_under_way() {
    let mut scene = Scene::up("locked", 2).expect("the scene works");
    make_heavy_ve(&scene);
    let tool = slow_move(&mut scene, SOURCE, TARGET);
    let target = TARGET.to_string();
    for (words, code) in [
        (&["vzmigrate", &target, VE][..], 20),
        (&["vzctl", "stop", VE], 9),
        (&["vzctl", "set", VE, "--cpus", "1", "--save"], 9),
        (&["vzctl", "destroy", VE], 9),
    ] {
        let ran = scene.run(SOURCE, words).expect("the scene works");
        assert_eq!(ran.code, Some(code), "{ran}");
        assert!(ran.stderr.contains("is locked: migrate is under way"), "{ran}");
    }
    // At the target it does not exist, and as soon as it does it is locked, too.
    let locked = || Ok(scene.run(TARGET, &["vzctl", "stop", VE])?.code == Some(9));
    scene.wait("the lock at the target", 30, locked).expect("it is locked");
    scene.testbed.rate(&SOURCE, None).expect("the scene works");
    let ran = end(tool);
    assert_eq!(ran.code, Some(0), "{ran}");
    assert_eq!(scene.running_on(VE).expect("the scene works"), [TARGET]);
}

#[test]
fn a_disk_that_fills_up_at_the_target_is_told() {
    let size = 256 << 20;
    let adapt = |options: &mut chaos_tests::testbed::Options| {
        options.disks.insert(TARGET, size);
    };
    let mut scene = Scene::up_with("fulldisk", 2, adapt).expect("the scene works");
    make_heavy_ve(&scene);
    let tool = slow_move(&mut scene, SOURCE, TARGET);
    // Somebody else takes what the offer had found free.
    let filler = scene.testbed.node_directory(&TARGET).join("state/filler");
    fill(&filler);
    let ran = end(tool);
    assert_eq!(ran.code, Some(31), "{ran}");
    assert!(ran.stderr.contains("space"), "{ran}");
    // With the disk still full the next attempt is refused before it begins.
    let words = ["vzmigrate", &TARGET.to_string(), VE];
    let ran = scene.run(SOURCE, &words).expect("the scene works");
    assert_eq!(ran.code, Some(31), "{ran}");
    assert!(ran.stderr.contains("free disk space"), "{ran}");
    std::fs::remove_file(&filler).expect("it is there");
    stays_and_can_move(&mut scene);
}

/// Writes until nothing more goes in.
fn fill(path: &std::path::Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).expect("a file");
    for size in [1 << 20, 4096] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}

#[test]
fn a_target_without_enough_memory_refuses() {
    let adapt = |options: &mut chaos_tests::testbed::Options| {
        options.memory.insert(TARGET, 150 << 20);
    };
    let scene = Scene::up_with("memory", 2, adapt).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    let program = "held = bytearray(b'x') * (128 << 20)
open('/run/held', 'w').close()
import signal; signal.pause()";
    let line = format!("setsid python3 -c \"{program}\" </dev/null >/dev/null 2>&1 &");
    scene.inside(SOURCE, VE, &line).expect("the scene works");
    let held =
        || Ok(scene.run(SOURCE, &["vzctl", "exec2", VE, "test -e /run/held"])?.code == Some(0));
    scene.wait("the memory to be used", 30, held).expect("the scene works");
    for words in [&["vzmigrate", "--check-only", "node2", VE][..], &["vzmigrate", "node2", VE]] {
        let ran = scene.run(SOURCE, words).expect("the scene works");
        assert_eq!(ran.code, Some(31), "{ran}");
        assert!(ran.stderr.contains("MiB of free memory"), "{ran}");
    }
    assert_eq!(scene.running_on(VE).expect("the scene works"), [SOURCE]);
    assert!(!directory(&scene, TARGET).exists(), "something is left at the target");
}

#[test]
fn a_target_that_cannot_be_reached_is_told() {
    let mut scene = Scene::up("cutoff", 3).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    scene.inside(SOURCE, VE, "echo yes > /run/alive").expect("the scene works");
    scene.testbed.cut(&SOURCE, &TARGET).expect("the scene works");
    let words = ["vzmigrate", &TARGET.to_string(), VE];
    let ran = scene.run(SOURCE, &words).expect("the scene works");
    assert_eq!(ran.code, Some(4), "{ran}");
    assert!(ran.stderr.contains("cannot reach node2"), "{ran}");
    scene.testbed.heal().expect("the scene works");
    stays_and_can_move(&mut scene);
}

/// How many questions a workload has had answered.
fn answered(scene: &Scene, node: Host) -> u64 {
    let status = scene.inside(node, VE, "selfcheck status").expect("no workload has failed");
    let count = status.split_whitespace().nth(1).and_then(|count| count.parse().ok());
    count.unwrap_or_else(|| panic!("a line for each workload: {status}"))
}

#[test]
fn a_freeze_in_vain_loses_no_datagram() {
    let scene = Scene::up("vain", 2).expect("the scene works");
    scene.make_ve(SOURCE, VE, "10.77.1.1").expect("the scene works");
    scene.put_selfcheck(SOURCE, VE).expect("the scene works");
    let _companion = scene.start_companion().expect("the scene works");
    let asking = format!("selfcheck run --detach --only udp-peer --peer {}", Scene::peer());
    scene.inside(SOURCE, VE, &asking).expect("the scene works");
    let places = [SOURCE, TARGET, SOURCE, TARGET];
    for ends in places.windows(2) {
        // A command of the host's keeps the VE from moving: it is frozen in vain until that ends.
        let words = ["vzctl", "exec2", VE, "exec </dev/null >/dev/null 2>&1; sleep 2"];
        let stranger = scene.start(ends[0], &words, Stdio::null()).expect("the scene works");
        let target = ends[1].to_string();
        scene.good(ends[0], &["vzmigrate", "--online", &target, VE]).expect("the VE moves");
        end(stranger);
        // One whose answer does not come waits for ten seconds.
        let before = answered(&scene, ends[1]);
        let goes_on = || Ok(answered(&scene, ends[1]) > before);
        scene.wait("the next answer", 5, goes_on).expect("every question is answered");
    }
}
