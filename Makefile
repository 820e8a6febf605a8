# Everything a person does with this tree. Each recipe is plain cargo, so it can be typed by hand.
# The tests and the demo need root: they make namespaces, cgroups and mounts of their own.

PREFIX ?= /usr/local
DESTDIR ?=
SEED ?=
NODES ?= 3
AGAINST ?=
PROGRAMS ?=
OPTIONS ?=

.PHONY: all build deps demo workloads stock test test-kernel bench verify fix chaos install uninstall

all: build

# What the programs need at run time (mmdebstrap, iproute2, nftables) and to be built. Installs
# only what is missing and says nothing when nothing is.
deps:
	@tools/deps

build: deps
	cargo build --release --workspace

# A redis with live clients goes round a cluster of three nodes on this machine.
demo: build
	target/release/demo --nodes $(NODES)

# Every self-checking workload: unmoved, moved, moved twice, checkpointed and restored.
workloads: build
	target/release/workloads

# Stock Debian 12 and 13 with the services of an ordinary server under load: fifty moves and ten
# checkpoints each, after which nobody may have noticed anything.
stock: build
	target/release/stock

# All tests, the end-to-end ones included. The last line is "N passed, N failed".
test:
	@tools/deps --test
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo build --release --workspace
	target/release/stock --templates-only --without-languages
	tools/run-tests

# Read-only checks, without root: what to run before a commit.
verify:
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo test --release -p tidy
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --release --workspace --no-deps

fix:
	cargo clippy --release --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

# Only the end-to-end tests with faults, optionally with the seed that a failure printed.
chaos: build
	FERRY_SEED="$(SEED)" FERRY_MOVES=40 tools/run-tests chaos-tests

# Moves on the kernel of another Debian release, in an emulated machine: SUITE=trixie, for example.
test-kernel: build
	tools/test-kernel $(SUITE)

# How far we are from the physical limit and from the ways people do it today. AGAINST=REV compares
# with another revision; PROGRAMS="blackout scale" picks, OPTIONS=--quick hurries.
bench: build
	@tools/deps --bench
	PROGRAMS="$(PROGRAMS)" OPTIONS="$(OPTIONS)" tools/bench $(AGAINST)

install: build
	tools/install "$(DESTDIR)" "$(PREFIX)"

uninstall:
	tools/install --remove "$(DESTDIR)" "$(PREFIX)"
