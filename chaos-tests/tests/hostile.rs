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

/// Fills the limit of processes; whatever is tried then fails.
const CROWDED: &str = "cat > /tmp/crowd.sh <<'X'
i=0
while [ $i -lt 2000 ]; do sleep 10000 & i=$((i+1)); done 2>/dev/null
wait
X
setsid sh /tmp/crowd.sh </dev/null >/dev/null 2>&1 &";

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
    let left = scene.inside(node, VE, "ps ax | grep -c '[/]tmp/.*s.sh'").unwrap();
    assert!(left.trim().parse::<u32>().unwrap() >= 6, "only {left} of its programs are left");
}

#[test]
fn a_ve_that_has_filled_its_limit_of_processes_moves() {
    let scene = Scene::up("crowded", 2).unwrap();
    scene.make_ve(Host::Node(1), VE, ADDRESS).unwrap();
    scene.good(Host::Node(1), &["vzctl", "set", VE, "--numproc", "150", "--save"]).unwrap();
    scene.inside(Host::Node(1), VE, CROWDED).unwrap();
    assert_eq!(shuttle(&scene, 2), 2);
}
