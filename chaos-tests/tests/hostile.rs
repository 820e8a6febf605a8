//! Virtual Environments that do their worst while they are moved: the move comes to an end in any
//! case, the VE is on one node afterwards and goes on with what it did, and the host is unharmed.

use std::time::{Duration, Instant};

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";
/// How long a move may take, whatever the VE does.
const LONGEST: Duration = Duration::from_secs(60);

/// Forks as fast as it can, and programs that execute themselves again and again.
const RESTLESS: &str = "cat > /tmp/forks.sh <<'X'
while :; do sleep 0.001 & sleep 0.002 & (: ; :) & wait; done
X
cat > /tmp/execs.sh <<'X'
: | cat > /dev/null
exec sh /tmp/execs.sh
X
for i in 1 2 3; do
  setsid sh /tmp/forks.sh </dev/null >/dev/null 2>&1 &
  setsid sh /tmp/execs.sh </dev/null >/dev/null 2>&1 &
done";

/// Counts those, each of which leads a session.
const COUNT: &str = "for i in 1 2 3 4 5 6 7 8 9 10; do
  n=$(ps ax -o pid=,sid=,args= | awk '$1 == $2' | grep -c '[/]tmp/.*s.sh')
  [ $n = 6 ] && break
done; echo $n";

/// Fills the limit of processes; whatever is tried then fails.
const CROWDED: &str = "cat > /tmp/crowd.sh <<'X'
i=0
while [ $i -lt 2000 ]; do sleep 10000 & i=$((i+1)); done 2>/dev/null
wait
X
setsid sh /tmp/crowd.sh </dev/null >/dev/null 2>&1 &";

/// Forks as fast as its limit of processes lets it, and takes up what others give back.
const BOMB: &str = "cat > /tmp/bomb.sh <<'X'
bomb() { bomb | bomb & }
while :; do bomb; sleep 0.2; done 2>/dev/null
X
setsid sh /tmp/bomb.sh </dev/null >/dev/null 2>&1 &";

/// Holds nearly all the memory that it may have, and asks for more all the time.
const GREEDY: &str = "cat > /tmp/greedy.sh <<'X'
head -c 40m /dev/zero | tail -c 40m | { sleep 1000000; cat; } >/dev/null &
while :; do head -c 60m /dev/urandom | tail -c 60m >/dev/null; done 2>/dev/null
X
setsid sh /tmp/greedy.sh </dev/null >/dev/null 2>&1 &";

/// Opens, closes and duplicates descriptors, without a pause.
const FICKLE: &str = "cat > /tmp/fickle.sh <<'X'
while :; do
  exec 3</etc/passwd 4<&3 5>/tmp/file 6>&5
  echo x >&6
  exec 3<&- 7<>/tmp/file 4<&- 5>&-
  rm -f /tmp/file
  exec 6>&- 7>&-
done
X
for i in 1 2 3 4; do setsid sh /tmp/fickle.sh </dev/null >/dev/null 2>&1 & done";

/// Moves the VE there and back, again and again. Each move ends in time; if it fails it says why,
/// and the VE runs where it was. Returns how many succeeded.
fn shuttle(scene: &Scene, moves: usize) -> usize {
    let (mut here, mut there) = (Host::Node(1), Host::Node(2));
    let mut good = 0;
    for turn in 0..moves {
        let start = Instant::now();
        let target = there.to_string();
        let ran = scene
            .run(here, &["vzmigrate", &target, VE, "--max-downtime", "5000"])
            .expect("the command runs");
        assert!(start.elapsed() < LONGEST, "move {turn} took {:?}: {ran}", start.elapsed());
        if ran.code == Some(0) {
            good += 1;
            std::mem::swap(&mut here, &mut there);
        } else {
            assert!(!ran.stderr.trim().is_empty(), "move {turn} failed without a word");
            println!("move {turn}: {ran}");
        }
        assert_eq!(
            scene.running_on(VE).expect("the nodes answer"),
            [here],
            "after move {turn}: {ran}"
        );
    }
    good
}

#[test]
fn a_ve_that_forks_and_executes_all_the_time_moves() {
    let scene = Scene::up("restless", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.inside(Host::Node(1), VE, RESTLESS).unwrap();
    let good = shuttle(&scene, 6);
    // Some move may meet it at the wrong moment; that none succeeds would be no accident.
    assert!(good >= 3, "{good} of 6 moves succeeded");
    let node = scene.running_on(VE).unwrap()[0];
    // One that executes something just now is nameless for a moment.
    let left = scene.inside(node, VE, COUNT).unwrap();
    assert_eq!(left.trim(), "6", "so many of its programs are left");
}

#[test]
fn a_ve_that_has_filled_its_limit_of_processes_moves() {
    let scene = Scene::up("crowded", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.good(Host::Node(1), &["vzctl", "set", VE, "--numproc", "150", "--save"]).unwrap();
    scene.inside(Host::Node(1), VE, CROWDED).unwrap();
    assert_eq!(shuttle(&scene, 2), 2);
}

#[test]
fn a_ve_that_forks_as_fast_as_it_can_harms_nobody() {
    let scene = Scene::up("bomb", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.good(Host::Node(1), &["vzctl", "set", VE, "--numproc", "120", "--save"]).unwrap();
    scene.inside(Host::Node(1), VE, BOMB).unwrap();
    let good = shuttle(&scene, 4);
    println!("{good} of 4 moves succeeded");
    // Whatever became of the moves, it can be stopped like any other.
    let node = scene.running_on(VE).unwrap()[0];
    scene.good(node, &["vzctl", "stop", VE, "--fast"]).unwrap();
}

#[test]
fn a_ve_that_has_filled_its_memory_moves() {
    let scene = Scene::up("greedy", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.good(Host::Node(1), &["vzctl", "set", VE, "--ram", "96M", "--save"]).unwrap();
    scene.inside(Host::Node(1), VE, GREEDY).unwrap();
    let good = shuttle(&scene, 4);
    assert!(good >= 2, "{good} of 4 moves succeeded");
}

#[test]
fn a_ve_whose_descriptors_change_all_the_time_moves() {
    let scene = Scene::up("fickle", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.inside(Host::Node(1), VE, FICKLE).unwrap();
    let good = shuttle(&scene, 6);
    assert!(good >= 5, "{good} of 6 moves succeeded");
    let node = scene.running_on(VE).unwrap()[0];
    // Without the child that one of them may just be making: they lead sessions of their own.
    let count = "ps -eo pid,sid,args | awk '$1 == $2 && /[f]ickle.sh/' | wc -l";
    let left = scene.inside(node, VE, count).unwrap();
    assert_eq!(left.trim(), "4", "its programs are left");
}
