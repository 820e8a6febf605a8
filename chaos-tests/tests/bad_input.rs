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
