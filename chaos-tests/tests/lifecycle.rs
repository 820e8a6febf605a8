//! The life of a VE on one node, as its users know it from OpenVZ: the words, the exit codes, and
//! nothing left at the end.

use chaos_tests::scene::Scene;
use chaos_tests::scene::traces::Traces;
use chaos_tests::testbed::Host;

const NODE: Host = Host::Node(1);

#[test]
fn a_ve_is_created_started_entered_changed_stopped_and_destroyed() {
    let scene = Scene::up("life", 1).unwrap();
    let before = Traces::of(&scene, NODE);
    let vz = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        scene.run(NODE, &words).unwrap()
    };
    let good = |line: &str| vz(line).good().unwrap_or_else(|error| panic!("{error}"));

    good("vzctl create 101 --ostemplate debian-12-minimal --ipadd 10.77.1.1/16 --hostname shop");
    assert_eq!(good("vzctl status 101").trim(), "CTID 101 exist unmounted down");
    assert_eq!(vz("vzctl exec 101 true").code, Some(31));
    good("vzctl start 101 --wait");
    assert_eq!(good("vzctl status 101").trim(), "CTID 101 exist mounted running");
    assert_eq!(vz("vzctl start 101").code, Some(32));
    assert_eq!(vz("vzctl create 101 --ostemplate debian-12-minimal").code, Some(44));
    assert_eq!(vz("vzctl destroy 101").code, Some(32));

    assert_eq!(good("vzctl exec 101 hostname").trim(), "shop");
    assert_eq!(good("vzctl exec 101 cat /proc/1/comm").trim(), "init");
    assert_eq!(vz("vzctl exec 101 exit 5").code, Some(8));
    assert_eq!(vz("vzctl exec2 101 exit 5").code, Some(5));
    // Init and what the host puts in begin as on a host, whatever the daemon may have itself.
    for process in ["1", "self"] {
        let limits = good(&format!("vzctl exec 101 cat /proc/{process}/limits"));
        let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_eq!(files.split_whitespace().nth(3), Some("1024"), "{files}");
    }
    let listed = good("vzlist -H -o ctid,status,ip,hostname");
    let listed: Vec<&str> = listed.split_whitespace().collect();
    assert_eq!(listed, ["101", "running", "10.77.1.1", "shop"]);
    scene.open_redis(NODE, "101").unwrap();
    let (report, _) = scene.load("10.77.1.1", 1, 1).unwrap().stop().unwrap();
    assert!(report.is_clean(), "{:?}", report.complaints);

    // Root inside is nobody outside.
    let uid_map = good("vzctl exec 101 cat /proc/self/uid_map");
    let outside: u32 = uid_map.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(outside >= 65_536, "{uid_map}");

    good("vzctl set 101 --numproc 60 --save");
    let bomb = "vzctl exec2 101 i=0; while [ $i -lt 100 ]; do sleep 2 & i=$((i+1)); done; wait";
    let refused = vz(bomb);
    assert_ne!(refused.code, Some(0), "{refused}");

    good("vzctl stop 101");
    assert_eq!(good("vzctl status 101").trim(), "CTID 101 exist unmounted down");
    assert_eq!(vz("vzctl stop 101").code, Some(31));
    good("vzctl destroy 101");
    assert_eq!(good("vzctl status 101").trim(), "CTID 101 deleted unmounted down");
    assert_eq!(vz("vzctl start 101").code, Some(14));

    let left = Traces::of(&scene, NODE).beyond(&before);
    let allowed = |thing: &String| thing.contains("template") || thing.ends_with(".destroyed");
    let left: Vec<_> = left.into_iter().filter(|thing| !allowed(thing)).collect();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn a_ve_outlives_the_daemon() {
    let mut scene = Scene::up("outlive", 1).unwrap();
    scene.make_ve(NODE, "101", "10.77.1.1").unwrap();
    scene.open_redis(NODE, "101").unwrap();
    let mut load = scene.load("10.77.1.1", 1, 1).unwrap();
    let pid = scene.inside(NODE, "101", "pidof redis-server").unwrap();
    scene.testbed.kill(&NODE).unwrap();
    load.mark("daemon killed").unwrap();
    scene.testbed.start(&NODE).unwrap();
    assert_eq!(scene.inside(NODE, "101", "pidof redis-server").unwrap(), pid);
    let (report, _) = load.stop().unwrap();
    assert!(report.is_clean() && report.requests > 0, "{:?}", report.complaints);
    assert_eq!(scene.running_on("101").unwrap(), [NODE]);
    scene.good(NODE, &["vzctl", "stop", "101", "--fast"]).unwrap();
    scene.good(NODE, &["vzctl", "destroy", "101"]).unwrap();
}
