//! Whatever a person may get wrong is told clearly, with the documented exit code, and changes
//! nothing.

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;

/// A command line, its exit code, and a word of what it must say.
type Case = (&'static str, i32, &'static str);

const CASES: &[Case] = &[
    ("vzctl start 999", 14, "999"),
    ("vzctl status nobody-of-that-name", 0, "deleted"),
    ("vzctl start 101", 32, "already running"),
    ("vzctl create 101 --ostemplate debian-12-minimal", 44, "already exists"),
    ("vzctl create 102 --ostemplate no-such-template", 91, "no-such-template"),
    ("vzctl create 102 --ostemplate debian-12-minimal --ipadd 10.77.1.1/16", 78, "10.77.1.1"),
    (
        "vzctl create 102 --ostemplate debian-12-minimal --ipadd not-an-address",
        71,
        "not-an-address",
    ),
    ("vzctl create 102 --no-such-option", 20, "--no-such-option"),
    ("vzctl set 101 --numproc many", 21, "many"),
    ("vzctl exec 103 true", 31, "not running"),
    ("vzctl stop 103", 31, "not running"),
    ("vzmigrate node2 999", 10, "999"),
    ("vzmigrate node2 103", 2, "not running"),
    ("vzmigrate node1 101", 34, "node1"),
    ("vzmigrate node9 101", 4, "node9"),
    ("vzmigrate --no-such-option node2 101", 1, "--no-such-option"),
    ("vzcluster join nonsense", 21, "ferry1-"),
    ("vzcluster remove node9", 8, "node9"),
];

#[test]
fn each_mistake_has_its_message_and_exit_code() {
    let scene = Scene::up("badinput", 2).unwrap();
    let node = Host::Node(1);
    scene.make_ve(node, "101", "10.77.1.1").unwrap();
    scene.good(node, &["vzctl", "create", "103", "--ostemplate", "debian-12-minimal"]).unwrap();
    let list = || scene.good(node, &["vzlist", "-a", "-H", "-o", "ctid,status,ip"]).unwrap();
    let before = list();
    let mut wrong = Vec::new();
    for (line, code, word) in CASES {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ran = scene.run(node, &words).unwrap();
        let said = format!("{}{}", ran.stdout, ran.stderr);
        if ran.code != Some(*code) || !said.contains(word) || said.contains("panicked") {
            wrong.push(format!("expected {code} and {word:?}: {ran}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(list(), before);
}

#[test]
fn what_cannot_be_moved_is_listed_all_at_once() {
    let scene = Scene::up("blockers", 2).unwrap();
    let node = Host::Node(1);
    scene.make_ve(node, "101", "10.77.1.1").unwrap();
    // A program with two sockets of the packet filter, which stay with their host.
    let program = "import signal, socket
held = [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) for _ in range(2)]
open('/run/held', 'w').close()
signal.pause()";
    let line = format!("setsid python3 -c \"{program}\" </dev/null >/dev/null 2>&1 &");
    scene.inside(node, "101", &line).unwrap();
    let wait = "i=0; until [ -e /run/held ] || [ $i = 100 ]; do sleep 0.1; i=$((i+1)); done; \
                [ -e /run/held ]";
    scene.inside(node, "101", wait).unwrap();
    for words in
        [&["vzmigrate", "--check-only", "node2", "101"][..], &["vzmigrate", "node2", "101"]]
    {
        let ran = scene.run(node, words).unwrap();
        assert_eq!(ran.code, Some(8), "{ran}");
        assert_eq!(ran.stderr.matches("packet filter").count(), 2, "{ran}");
        assert!(ran.stderr.contains("python3"), "{ran}");
    }
    assert_eq!(scene.running_on("101").unwrap(), [node]);
}

#[test]
fn a_target_that_is_down_is_told_and_nothing_changes() {
    let mut scene = Scene::up("down", 3).unwrap();
    let node = Host::Node(1);
    scene.make_ve(node, "101", "10.77.1.1").unwrap();
    scene.testbed.kill(&Host::Node(2)).unwrap();
    let ran = scene.run(node, &["vzmigrate", "node2", "101"]).unwrap();
    assert_eq!(ran.code, Some(4), "{ran}");
    assert_eq!(scene.running_on("101").unwrap(), [node]);
    scene.testbed.start(&Host::Node(2)).unwrap();
    scene.good(node, &["vzmigrate", "node2", "101"]).unwrap();
    assert_eq!(scene.running_on("101").unwrap(), [Host::Node(2)]);
}
