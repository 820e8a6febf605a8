//! Joins the nodes of a testbed into a cluster, with the programs that a user would use.

use super::{Host, Testbed, TestbedError, system};

/// The first node founds the cluster, each other one joins it with a token of its own.
pub(super) fn join(testbed: &Testbed) -> Result<(), TestbedError> {
    let nodes = testbed.nodes();
    let Some((first, others)) = nodes.split_first() else { return Ok(()) };
    let run = |node: &Host, arguments: &[&str]| {
        let name = node.to_string();
        let address = node.address().to_string();
        let mut all = arguments.to_vec();
        if matches!(arguments.first(), Some(&"init" | &"join")) {
            all.extend(["--name", &name, "--address", &address]);
        }
        vzcluster(testbed, node, &all)
    };
    run(first, &["init"])?;
    for node in others {
        let token = run(first, &["token"])?;
        run(node, &["join", token.trim()])?;
    }
    Ok(())
}

fn vzcluster(testbed: &Testbed, node: &Host, arguments: &[&str]) -> Result<String, TestbedError> {
    let output = testbed
        .command(node, "vzcluster")
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(system("run", "vzcluster"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(TestbedError::Program {
        // Without the token: it is a secret while it is not used.
        command: format!("vzcluster {}", arguments.first().unwrap_or(&"")),
        node: node.to_string(),
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
