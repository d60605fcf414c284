# Thin names over cargo and scripts/.
#
#   make quickstart   packages, build, demo image, a cluster of two VMs, and away again
#   make test         every test; as root the privileged ones too
#   make test-full    the same with every case of the crash sweep: half an hour more
#   make lab          a shell on a cluster: Slurm, etcd, Open vSwitch on hosts in namespaces
#   make lab-down     takes it down from elsewhere, and what a killed one left
#   make fuzz         libFuzzer on every reader of strangers' bytes, FUZZ_SECONDS each; wants a
#                     nightly compiler and cargo-fuzz, and says so
#   make bench        every figure that the README quotes, beside its peer or floor
#   make lint         what `make test` checks before it tests
#   make man          the manual pages, in target/man
#   make package      Debian packages for a site, in target/package

CARGO ?= cargo

.PHONY: quickstart test test-full lint fuzz bench lab lab-down man package packages-build packages-run \
  packages-test packages-bench packages-package target/sushy target/schemathesis

quickstart: packages-run
	$(CARGO) build --release --locked
	scripts/quickstart target/release/pavo

lint: packages-build
	$(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

# OpenStack's emulator of Redfish, which Debian does not have.
target/sushy: packages-test
	test -x $@/bin/sushy-emulator || { rm -rf $@ && python3 -m venv $@ && \
	  $@/bin/pip install --quiet --disable-pip-version-check sushy-tools==2.2.0; }

# Asks the daemon whatever its contract allows, and much that it does not.
target/schemathesis: packages-test
	test -x $@/bin/schemathesis || { rm -rf $@ && python3 -m venv $@ && \
	  $@/bin/pip install --quiet --disable-pip-version-check schemathesis==4.32.5; }

test: packages-test target/sushy target/schemathesis lint
	$(CARGO) test --workspace --locked

test-full: export PAVO_FULL = 1
test-full: test

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

# Only pavo's own code and safe crates read what is fuzzed: the address sanitizer would slow
# it by half and find nothing.
fuzz: packages-build
	@cargo +nightly fuzz --version || \
	  { echo 'help: rustup toolchain install nightly; cargo install cargo-fuzz' >&2; exit 1; }
	$(CARGO) run --quiet --locked --package pavo-fuzz --bin seeds fuzz/corpus
	for target in $(FUZZ_TARGETS); do cargo +nightly fuzz run --sanitizer none \
	  --features libfuzzer $$target -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 || exit 1; done

bench: packages-bench
	$(CARGO) bench --locked

# A lab makes namespaces, cgroups and users' homes.
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo)

lab: packages-test
	$(CARGO) build --workspace --locked
	$(AS_ROOT) target/debug/pavo-lab shell

lab-down:
	$(AS_ROOT) target/debug/pavo-lab down

man: packages-build
	$(CARGO) run --quiet --locked --package pavo-man target/man

package: packages-package
	scripts/package

# What only has to be there is installed; nothing else of the machine is changed.
packages-build:
	scripts/packages build
packages-run: packages-build
	scripts/packages run
packages-test: packages-run
	scripts/packages test image
packages-bench: packages-test
	scripts/packages bench
packages-package: packages-build
	scripts/packages package
