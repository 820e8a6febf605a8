//! Services of Debian in a VE, set up so that clients outside can use them.

use chaos_tests::testbed::Host;

use super::{Stage, StageError, Ve};

/// PostgreSQL with the tables of pgbench; everybody on the LAN may use it.
pub fn start_postgres(stage: &Stage, ve: &Ve) -> Result<(), StageError> {
    for line in [
        "echo \"listen_addresses = '*'\" >> /etc/postgresql/15/main/postgresql.conf",
        "echo 'host all all 10.77.0.0/16 trust' >> /etc/postgresql/15/main/pg_hba.conf",
        "/etc/init.d/postgresql start",
    ] {
        stage.scene.inside(ve.home, ve.id, line)?;
    }
    let fill = ["pgbench", "-h", ve.address, "-U", "postgres", "-i", "-s", "10", "-q", "postgres"];
    stage.scene.good(Host::Client, &fill)?;
    Ok(())
}

/// nginx with one page.
pub fn start_nginx(stage: &Stage, ve: &Ve) -> Result<(), StageError> {
    // Otherwise it closes the connection of a probe after a thousand answers.
    let setting = "echo 'keepalive_requests 1000000000;' > /etc/nginx/conf.d/bench.conf";
    stage.scene.inside(ve.home, ve.id, setting)?;
    stage.scene.inside(ve.home, ve.id, "/etc/init.d/nginx start")?;
    Ok(())
}
