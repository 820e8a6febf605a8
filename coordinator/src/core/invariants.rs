//! What must hold whatever is asked, in whatever order, however often.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use transport::{NodeId, Versions};

use super::*;

const NODES: u64 = 3;

fn node_facts(node: u64) -> NodeFacts {
    let address = Some(([10, 77, 255, u8::try_from(node).unwrap()], 7420).into());
    NodeFacts { name: format!("node{node}"), address, versions: Versions::CURRENT }
}

fn ve_facts(ve: u32, address: u8) -> VeFacts {
    let addresses = BTreeSet::from([[10, 77, 1, address].into()]);
    VeFacts { name: Some(format!("ve{ve}")), addresses, spec: String::new() }
}

/// A cluster of three nodes.
fn core() -> Core {
    let mut core = Core::default();
    let cluster = "test".to_owned();
    let found = Command::Found { cluster, node: NodeId(1), facts: node_facts(1) };
    apply(&mut core, 1 << 100, found).unwrap();
    for node in 2..=NODES {
        let token = format!("token{node}");
        let add = Command::AddToken { token: token.clone(), expires_ms: u64::MAX };
        apply(&mut core, (1 << 100) + u128::from(node) * 2, add).unwrap();
        let admit = Command::AdmitNode { token, facts: node_facts(node), ves: vec![] };
        let admitted = apply(&mut core, (1 << 100) + u128::from(node) * 2 + 1, admit);
        assert_eq!(admitted, Ok(Response::Admitted { node: NodeId(node) }));
    }
    core
}

fn apply(core: &mut Core, id: u128, command: Command) -> Answer {
    core.apply(Request { id: RequestId(id), at_ms: 1000, command })
}

fn any_command() -> impl Strategy<Value = Command> {
    let ve = (101u32..104).prop_map(VeId);
    let node = (1..=NODES).prop_map(NodeId);
    let epoch = (0u64..8).prop_map(Epoch);
    let migration = (0u128..6).prop_map(MigrationId);
    let desired = prop_oneof![Just(Desired::Running), Just(Desired::Stopped)];
    prop_oneof![
        2 => (ve.clone(), node.clone(), 1u8..4).prop_map(|(ve, owner, address)| {
            Command::RegisterVe { ve, owner, facts: ve_facts(ve.0, address) }
        }),
        1 => (ve.clone(), epoch.clone(), 1u8..4).prop_map(|(ve, epoch, address)| {
            Command::UpdateVe { ve, epoch, facts: ve_facts(ve.0, address) }
        }),
        1 => (ve.clone(), epoch.clone()).prop_map(|(ve, epoch)| Command::UnregisterVe { ve, epoch }),
        1 => (ve.clone(), epoch.clone(), desired)
            .prop_map(|(ve, epoch, desired)| Command::SetDesired { ve, epoch, desired }),
        6 => (migration.clone(), ve, epoch.clone(), node.clone(), node.clone()).prop_map(
            |(migration, ve, epoch, source, target)| Command::BeginMigration {
                migration, ve, epoch, source, target
            }
        ),
        4 => (migration.clone(), epoch.clone())
            .prop_map(|(migration, epoch)| Command::Switch { migration, epoch }),
        2 => migration.clone().prop_map(|migration| Command::AbortMigration { migration }),
        2 => migration.clone().prop_map(|migration| Command::ReportRunning { migration }),
        2 => (migration.clone(), epoch)
            .prop_map(|(migration, epoch)| Command::ReturnVe { migration, epoch }),
        3 => migration.prop_map(|migration| Command::FinishMigration { migration }),
        1 => node.prop_map(|node| Command::RemoveNode { node }),
        1 => prop::option::of(0u64..9).prop_map(|limit| Command::SetBandwidth { limit }),
    ]
}

/// What one step may have done.
fn check_step(before: &State, after: &State, command: &Command, answer: &Answer) {
    if answer.is_err() {
        let mut same = before.clone();
        same.now_ms = after.now_ms;
        assert_eq!(&same, after, "a refused {command:?} changed something");
    }
    for (id, record) in &before.migrations {
        let Some(now) = after.migrations.get(id) else { continue };
        let stays = record.stage == now.stage;
        assert!(
            stays || record.stage.may_become(now.stage),
            "{command:?} took {id} from {} to {}",
            record.stage,
            now.stage
        );
    }
    if let Command::FinishMigration { migration } = command
        && is_unsettled_at_its_source(before, *migration)
    {
        assert_eq!(before.verdict(*migration), after.verdict(*migration), "of {migration}");
    }
    for (ve, record) in &before.ves {
        let Some(now) = after.ves.get(ve) else { continue };
        assert!(now.epoch >= record.epoch, "{command:?} took VE {ve} to an older epoch");
        if now.owner != record.owner {
            assert!(now.epoch > record.epoch, "VE {ve} has a new owner in the same epoch");
            assert!(matches!(command, Command::Switch { .. } | Command::ReturnVe { .. }));
        }
    }
}

/// Whether the source of an ended migration may not have asked yet how it ended: it has done
/// nothing with the VE since.
fn is_unsettled_at_its_source(state: &State, migration: MigrationId) -> bool {
    let Some(record) = state.migrations.get(&migration) else { return false };
    let epoch = state.ves.get(&record.ve).map(|ve| ve.epoch);
    match record.stage {
        Stage::Begun | Stage::Switched => false,
        Stage::Aborted => epoch == Some(record.epoch),
        Stage::Returned => epoch == Some(record.epoch.next().next()),
        Stage::Running | Stage::Finished => true,
    }
}

/// What must hold at rest.
fn check_state(state: &State) {
    let mut addresses = BTreeMap::new();
    for (ve, record) in &state.ves {
        assert!(state.nodes.contains_key(&record.owner), "VE {ve} belongs to nobody");
        for address in &record.facts.addresses {
            assert_eq!(addresses.insert(*address, *ve), None, "{address} is there twice");
        }
        let going_on: Vec<_> = state
            .migrations
            .values()
            .filter(|other| other.ve == *ve)
            .filter(|other| matches!(other.stage, Stage::Begun | Stage::Switched))
            .map(|other| other.id)
            .collect();
        assert_eq!(going_on, Vec::from_iter(record.migration), "VE {ve} moves twice");
    }
    for migration in state.migrations.values() {
        let Some(ve) = state.ves.get(&migration.ve) else { continue };
        match migration.stage {
            Stage::Begun => {
                assert_eq!((ve.owner, ve.epoch), (migration.source, migration.epoch));
            }
            Stage::Switched => {
                assert_eq!((ve.owner, ve.epoch), (migration.target, migration.epoch.next()));
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn one_owner_and_nothing_goes_back(commands in prop::collection::vec(any_command(), 1..80)) {
        let mut core = core();
        for (number, command) in commands.into_iter().enumerate() {
            let before = core.state.clone();
            let answer = apply(&mut core, number as u128, command.clone());
            check_step(&before, &core.state, &command, &answer);
            check_state(&core.state);
        }
    }

    #[test]
    fn a_request_sent_again_has_one_effect_and_one_answer(
        commands in prop::collection::vec(any_command(), 1..60),
        again in prop::collection::vec(0usize..60, 1..60),
    ) {
        let mut core = core();
        let mut answers = Vec::new();
        for (number, command) in commands.iter().enumerate() {
            answers.push(apply(&mut core, number as u128, command.clone()));
            for &late in again.iter().filter(|&&late| late <= number) {
                let before = core.state.clone();
                let answer = apply(&mut core, late as u128, commands[late].clone());
                prop_assert_eq!(&answer, &answers[late]);
                prop_assert_eq!(&before, &core.state);
            }
        }
    }

    #[test]
    fn of_switch_and_abort_the_first_wins(
        racers in prop::collection::vec(any::<bool>(), 2..10)
    ) {
        let mut core = core();
        let ve = VeId(101);
        let register =
            Command::RegisterVe { ve, owner: NodeId(1), facts: ve_facts(101, 1) };
        apply(&mut core, 1, register).unwrap();
        let (migration, epoch) = (MigrationId(1), Epoch(1));
        let (source, target) = (NodeId(1), NodeId(2));
        let begin = Command::BeginMigration { migration, ve, epoch, source, target };
        apply(&mut core, 2, begin).unwrap();
        let first = racers[0];
        for (number, &switches) in racers.iter().enumerate() {
            let command = if switches {
                Command::Switch { migration, epoch }
            } else {
                Command::AbortMigration { migration }
            };
            let answer = apply(&mut core, 10 + number as u128, command);
            prop_assert_eq!(answer.is_ok(), switches == first);
        }
        prop_assert_eq!(core.state.ves[&ve].owner, if first { target } else { source });
    }

    #[test]
    fn a_snapshot_is_the_state(commands in prop::collection::vec(any_command(), 1..60)) {
        let mut core = core();
        for (number, command) in commands.into_iter().enumerate() {
            let _ = apply(&mut core, number as u128, command);
        }
        let text = serde_json::to_string(&core).unwrap();
        prop_assert_eq!(serde_json::from_str::<Core>(&text).unwrap(), core);
    }
}

/// The whole way there, and the whole way back when the target cannot run it.
#[test]
fn a_returned_ve_is_its_sources_again_in_a_newer_epoch() {
    let mut core = core();
    let ve = VeId(101);
    let (source, target, migration) = (NodeId(1), NodeId(2), MigrationId(7));
    let mut number = 0;
    let mut ask = |command| {
        number += 1;
        apply(&mut core, number, command)
    };
    ask(Command::RegisterVe { ve, owner: source, facts: ve_facts(101, 1) }).unwrap();
    let epoch = Epoch(1);
    ask(Command::BeginMigration { migration, ve, epoch, source, target }).unwrap();
    let stale = ask(Command::Switch { migration, epoch: Epoch(2) });
    let (believed, current) = (Epoch(2), Epoch(1));
    assert_eq!(stale, Err(Refused::StaleEpoch { ve, believed, current }));
    let switched = ask(Command::Switch { migration, epoch });
    assert_eq!(switched, Ok(Response::Epoch { epoch: Epoch(2) }));
    let returned = ask(Command::ReturnVe { migration, epoch: Epoch(2) });
    assert_eq!(returned, Ok(Response::Epoch { epoch: Epoch(3) }));
    let stage = Stage::Returned;
    let late = ask(Command::ReportRunning { migration });
    assert_eq!(late, Err(Refused::WrongStage { migration, stage }));
    // What the target has left must be gone before the VE may come again.
    let (migration, epoch) = (MigrationId(8), Epoch(3));
    let again = Command::BeginMigration { migration, ve, epoch, source, target };
    assert_eq!(ask(again.clone()), Err(Refused::CopyLeft { ve, node: target }));
    ask(Command::FinishMigration { migration: MigrationId(7) }).unwrap();
    ask(again).unwrap();
    assert_eq!(core.state.ves[&ve].owner, source);
}

/// The target says that nothing is left there before the source has asked how it ended.
#[test]
fn a_ve_that_did_not_move_stays_whoever_asks_last() {
    let ve = VeId(101);
    let (source, target, migration, epoch) = (NodeId(1), NodeId(2), MigrationId(7), Epoch(1));
    let returned = Command::ReturnVe { migration, epoch: Epoch(2) };
    let ways = [
        (vec![Command::AbortMigration { migration }], Verdict::Stays),
        (vec![Command::Switch { migration, epoch }, returned], Verdict::Stays),
        (
            vec![Command::Switch { migration, epoch }, Command::ReportRunning { migration }],
            Verdict::Moved,
        ),
    ];
    for (way, verdict) in ways {
        let mut core = core();
        let mut number = 0;
        let mut ask = |command| {
            number += 1;
            apply(&mut core, number, command).unwrap();
            core.state.verdict(migration)
        };
        ask(Command::RegisterVe { ve, owner: source, facts: ve_facts(101, 1) });
        assert_eq!(ask(Command::BeginMigration { migration, ve, epoch, source, target }), None);
        let settled = way.into_iter().map(&mut ask).last();
        assert_eq!(settled, Some(Some(verdict)));
        assert_eq!(ask(Command::FinishMigration { migration }), Some(verdict));
    }
}

#[test]
fn a_token_lets_one_node_in_before_it_expires() {
    let mut core = core();
    let admit = |token: &str, node| {
        let (token, ves) = (token.to_owned(), vec![]);
        Command::AdmitNode { token, facts: node_facts(node), ves }
    };
    assert_eq!(apply(&mut core, 1, admit("none", 4)), Err(Refused::TokenUnknown));
    let by = NodeId(2);
    assert_eq!(apply(&mut core, 2, admit("token2", 4)), Err(Refused::TokenUsed { by }));
    let late = Command::AddToken { token: "late".into(), expires_ms: 1000 };
    apply(&mut core, 3, late).unwrap();
    assert_eq!(apply(&mut core, 4, admit("late", 4)), Err(Refused::TokenExpired));
    let add = Command::AddToken { token: "good".into(), expires_ms: 1001 };
    apply(&mut core, 5, add).unwrap();
    let (name, node) = ("node2".to_owned(), NodeId(2));
    assert_eq!(apply(&mut core, 6, admit("good", 2)), Err(Refused::NodeNameTaken { name, node }));
    let node = NodeId(4);
    assert_eq!(apply(&mut core, 7, admit("good", 4)), Ok(Response::Admitted { node }));
}

#[test]
fn all_clashes_of_a_newcomers_ves_are_told_at_once() {
    let mut core = core();
    let owner = NodeId(1);
    for (number, ve) in [101, 102].into_iter().enumerate() {
        let facts = ve_facts(ve, u8::try_from(ve).unwrap());
        let register = Command::RegisterVe { ve: VeId(ve), owner, facts };
        apply(&mut core, number as u128, register).unwrap();
    }
    let add = Command::AddToken { token: "good".into(), expires_ms: u64::MAX };
    apply(&mut core, 5, add).unwrap();
    let bring = |ve, address| VeBrought {
        ve: VeId(ve),
        facts: VeFacts { name: None, ..ve_facts(ve, address) },
        desired: Desired::Running,
    };
    let admit = |ves| Command::AdmitNode { token: "good".into(), facts: node_facts(4), ves };
    let clashing = vec![bring(101, 9), bring(201, 102), bring(202, 8), bring(203, 8)];
    let Err(refused) = apply(&mut core, 6, admit(clashing)) else { panic!("admitted") };
    assert_eq!(
        refused.to_string(),
        "VE 101 exists already, on node 1, the address 10.77.1.102 is in use by VE 102, \
         the address 10.77.1.8 is in use by VE 202"
    );
    let fitting = vec![bring(201, 9), bring(202, 8)];
    let node = NodeId(4);
    assert_eq!(apply(&mut core, 7, admit(fitting)), Ok(Response::Admitted { node }));
    assert_eq!(core.state.ves[&VeId(202)].owner, node);
}
