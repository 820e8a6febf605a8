//! Stock Debian releases with ordinary services under load: nobody notices that they are moved.

use chaos_tests::stock::{Plan, play};

/// The whole campaign is `make stock`.
fn nobody_notices(release: &str) {
    let plan = Plan {
        release: release.to_owned(),
        moves: 4,
        checkpoints: 2,
        languages: false,
        name: "stock".to_owned(),
    };
    let rows = play(&plan, &mut |what| eprintln!("{what}")).expect("the scene works");
    let bad: Vec<_> = rows.iter().filter(|row| !row.good).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn a_stock_debian_12_does_not_notice_that_it_is_moved() {
    nobody_notices("debian-12");
}

#[test]
fn a_stock_debian_13_does_not_notice_that_it_is_moved() {
    nobody_notices("debian-13");
}
