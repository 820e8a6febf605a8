//! The template: a Debian release as it is shipped, with the services of an ordinary server from
//! its own packages and a program in each of four languages.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The ports of the programs.
pub(super) const PYTHON: u16 = 7001;
pub(super) const JAVA: u16 = 7002;
pub(super) const GO: u16 = 7003;
pub(super) const NODE: u16 = 7004;

const PACKAGES: &[&str] =
    &["nginx", "ssl-cert", "postgresql", "redis-server", "exim4-daemon-light", "python3"];
/// Compilers and all: they take long to install.
const LANGUAGES: &[&str] = &["default-jdk-headless", "golang-go", "nodejs"];

/// Lets the services be reached from outside, as an administrator would.
const OPEN: &str = r"set -e
sed -i 's/^bind .*/bind * -::*/; s/^protected-mode yes/protected-mode no/' /etc/redis/redis.conf
sed -i 's/^appendonly no/appendonly yes/' /etc/redis/redis.conf
for cluster in /etc/postgresql/*/main; do
    echo 'host all all samenet trust' >> $cluster/pg_hba.conf
    echo 'listen_addresses = '\''*'\' > $cluster/conf.d/stock.conf
    chmod 644 $cluster/conf.d/stock.conf
done
sed -i 's/^dc_local_interfaces=.*/dc_local_interfaces='\'\''/' /etc/exim4/update-exim4.conf.conf
useradd --create-home stock
mkdir -p /var/lib/stock";

const SITE: &str = "server {
    listen 80 default_server;
    listen 443 ssl default_server;
    include snippets/snakeoil.conf;
    root /var/www/html;
    index index.nginx-debian.html;
    # Connections that last as long as their clients.
    keepalive_requests 100000000;
    keepalive_time 1d;
}
";

/// A program with a unit of its own; each unit isolates it in another way.
struct Program {
    name: &'static str,
    source: (&'static str, &'static str),
    build: Option<&'static str>,
    unit: &'static str,
}

const PYTHON_PROGRAM: Program = Program {
    name: "python",
    source: ("server.py", include_str!("servers/server.py")),
    build: None,
    unit: "ExecStart=/usr/bin/python3 /srv/stock/server.py 7001
DynamicUser=yes
StateDirectory=stock-python",
};

const PROGRAMS: &[Program] = &[
    Program {
        name: "java",
        source: ("Server.java", include_str!("servers/Server.java")),
        build: Some("cd /srv/stock && javac Server.java"),
        unit: "ExecStart=/usr/bin/java -Xmx256m -cp /srv/stock Server 7002
User=nobody
PrivateTmp=yes
ProtectSystem=full
ProtectHome=yes",
    },
    Program {
        name: "go",
        source: ("server.go", include_str!("servers/server.go")),
        build: Some(
            "cd /srv/stock && HOME=/tmp/go CGO_ENABLED=0 go build -o server-go server.go && \
             rm -rf /tmp/go",
        ),
        unit: "ExecStart=/srv/stock/server-go 7003
User=nobody
ProtectSystem=strict
PrivateDevices=yes
ProtectKernelTunables=yes",
    },
    Program {
        name: "node",
        source: ("server.js", include_str!("servers/server.js")),
        build: None,
        unit: "ExecStart=/usr/bin/node /srv/stock/server.js 7004 /var/lib/stock-node
DynamicUser=yes
StateDirectory=stock-node
SystemCallFilter=~@mount @swap @reboot",
    },
];

/// What is written into the template's description; see `node::template::Metadata`.
#[derive(Debug, Serialize)]
struct Description {
    base: String,
    description: String,
    packages: Vec<&'static str>,
    commands: Vec<String>,
    files: std::collections::BTreeMap<String, String>,
}

/// A template that stands on this release. With all languages it has Java, Go and Node.js, too.
fn description(release: &str, languages: bool) -> Description {
    let mut packages = PACKAGES.to_vec();
    let mut programs = vec![&PYTHON_PROGRAM];
    if languages {
        packages.extend(LANGUAGES);
        programs.extend(PROGRAMS);
    }
    let wanted_by = "/etc/systemd/system/multi-user.target.wants";
    let mut commands = vec![OPEN.to_owned(), format!("mkdir -p /srv/stock {wanted_by}")];
    let mut files = std::collections::BTreeMap::new();
    for Program { name, source: (file, text), build, unit } in programs {
        // Files are put there after the commands, so what is built comes with one.
        commands.push(format!("cat > /srv/stock/{file} <<'END'\n{text}END"));
        commands.extend(build.map(str::to_owned));
        commands.push(format!("ln -s ../stock-{name}.service {wanted_by}/"));
        let text = format!(
            "[Unit]\nDescription=The {name} program\nAfter=network.target\n\n[Service]\n{unit}\n\n\
             [Install]\nWantedBy=multi-user.target\n"
        );
        files.insert(format!("/etc/systemd/system/stock-{name}.service"), text);
    }
    files.insert("/etc/nginx/sites-available/default".to_owned(), SITE.to_owned());
    let minutely = "* * * * * root date +\\%s >> /var/lib/stock/cron\n";
    files.insert("/etc/cron.d/stock".to_owned(), minutely.to_owned());
    let description = format!("{release} with the services of an ordinary server");
    Description { base: release.to_owned(), description, packages, commands, files }
}

/// Describes the template in the template directory and returns its name. It has another name
/// when its description is another, so that no old cache is taken for it.
pub(super) fn describe(
    directory: &Path,
    release: &str,
    languages: bool,
) -> std::io::Result<String> {
    let text = toml::to_string(&description(release, languages)).map_err(std::io::Error::other)?;
    let hash = blake3::hash(text.as_bytes()).to_hex();
    let name = format!("stock-{release}-{}", &hash[..8]);
    fs::create_dir_all(directory)?;
    let path = directory.join(format!("{name}.toml"));
    // Somebody else may read it meanwhile.
    let draft = directory.join(format!(".{name}.{}", std::process::id()));
    fs::write(&draft, text)?;
    fs::rename(draft, path)?;
    Ok(name)
}

/// Where the files of a template are that has been used.
pub(super) fn unpacked(directory: &Path, name: &str) -> std::io::Result<PathBuf> {
    let text = fs::read_to_string(directory.join("cache").join(format!("{name}.toml")))?;
    let cache: toml::Table = text.parse().map_err(std::io::Error::other)?;
    let digest = cache.get("digest").and_then(toml::Value::as_str).unwrap_or_default();
    Ok(directory.join("lower").join(digest))
}
