# Thin names over cargo and scripts/.
#
#   make quickstart   packages, build, demo image, a cluster of two VMs, and away again
#   make test         every test; as root the privileged ones too
#   make bench        every figure that the README quotes, beside its peer or floor
#   make lint         what `make test` checks before it tests

CARGO ?= cargo

.PHONY: quickstart test lint bench packages-build packages-run packages-test

quickstart: packages-run
	$(CARGO) build --release --locked
	scripts/quickstart target/release/pavo

lint: packages-build
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --locked -- -D warnings

test: packages-test lint
	$(CARGO) test --locked

bench: packages-test
	$(CARGO) bench --locked

# What only has to be there is installed; nothing else of the machine is changed.
packages-build:
	scripts/packages build
packages-run: packages-build
	scripts/packages run
packages-test: packages-run
	scripts/packages test
