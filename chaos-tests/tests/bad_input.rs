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
    // The first node's own address, the second's, and those of a host that is no node.
    ("vzctl create 102 --ostemplate debian-12-minimal --ipadd 10.77.255.1", 78, "10.77.255.1"),
    ("vzctl create 102 --ostemplate debian-12-minimal --ipadd 10.77.255.2", 78, "MAC address"),
    ("vzctl create 102 --ostemplate debian-12-minimal --ipadd fd77::250/64", 78, "fd77::250"),
    ("vzctl set 101 --ipadd 10.77.255.250 --save", 78, "10.77.255.250"),
    ("vzctl set 103 --ipadd 10.77.1.1/16 --save", 78, "container 101"),
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
    let address = ["ip", "address", "add", "fd77::250/64", "dev", "eth0", "nodad"];
    scene.good(Host::Client, &address).unwrap();
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

/// A host that is no node takes a VE's address while the VE does not run.
#[test]
fn a_ve_whose_address_was_taken_meanwhile_does_not_start() {
    let scene = Scene::up("taken", 1).unwrap();
    let node = Host::Node(1);
    scene.make_ve(node, "101", "10.77.1.1").unwrap();
    scene.good(node, &["vzctl", "stop", "101"]).unwrap();
    let change = |verb: &str| {
        scene.good(Host::Client, &["ip", "address", verb, "10.77.1.1/16", "dev", "eth0"]).unwrap()
    };
    change("add");
    let ran = scene.run(node, &["vzctl", "start", "101"]).unwrap();
    assert_eq!(ran.code, Some(78), "{ran}");
    assert!(ran.stderr.contains("10.77.1.1 is already in use"), "{ran}");
    assert!(scene.running_on("101").unwrap().is_empty());
    change("del");
    scene.good(node, &["vzctl", "start", "101"]).unwrap();
    assert_eq!(scene.running_on("101").unwrap(), [node]);
}

#[test]
fn what_cannot_be_moved_is_listed_all_at_once() {
    let scene = Scene::up("blockers", 2).unwrap();
    let node = Host::Node(1);
    scene.make_ve(node, "101", "10.77.1.1").unwrap();
    // A program with two sockets to the hypervisor (AF_VSOCK, SOCK_STREAM), and a debugger.
    let hold = "syscall(41, 40, 1, 0) > 0 && syscall(41, 40, 1, 0) > 0 && open F, '>/run/held'";
    let line = format!("setsid perl -e \"{hold}; sleep\" </dev/null >/dev/null 2>&1 &");
    scene.inside(node, "101", &line).unwrap();
    let trace = "if (!fork) { syscall(101, 0, 0, 0, 0); open F, '>/run/traced' } sleep";
    let line = format!("setsid perl -e \"{trace}\" </dev/null >/dev/null 2>&1 &");
    scene.inside(node, "101", &line).unwrap();
    let wait = "i=0; until [ -e /run/held -a -e /run/traced ] || [ $i = 100 ]; do sleep 0.1; \
                i=$((i+1)); done; [ -e /run/held -a -e /run/traced ]";
    scene.inside(node, "101", wait).unwrap();
    for words in
        [&["vzmigrate", "--check-only", "node2", "101"][..], &["vzmigrate", "node2", "101"]]
    {
        let ran = scene.run(node, words).unwrap();
        assert_eq!(ran.code, Some(8), "{ran}");
        assert_eq!(ran.stderr.matches("vsock").count(), 2, "{ran}");
        assert!(ran.stderr.contains("perl"), "{ran}");
        assert!(ran.stderr.contains("process under ptrace"), "{ran}");
        assert!(ran.stderr.contains("end the debugger"), "{ran}");
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
