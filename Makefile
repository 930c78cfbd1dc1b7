# Every target makes its own environment in .venv from requirements.lock; only Python 3.11 to 3.13 and make are assumed.
# `make test-gpu PYTHON=python3 VENV=` takes a given interpreter as it is: nothing is made or fetched.
PYTHON ?= python3
VENV ?= .venv
BIN := .venv/bin
READY := .venv/ready
TESTS := .venv/ready-for-tests
TORCH := 2.13.0
EXTRAS := cluster tensorboard mlflow wandb dashboard  # tested with the real libraries

.PHONY: demo test test-all test-gpu lint types audit bench format lock clean

demo: $(READY)  ## run the quick allocation study and open the way to its report
	$(BIN)/sparsemem run sweeps/allocation-quick.yaml

test: $(TESTS)  ## the tests, on two cores at most six minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile sparsemem analysis tests

test-all: $(TESTS)  ## the slow and fault tests too
	$(BIN)/python -m pytest -m "not gpu" sparsemem analysis tests

test-gpu: $(if $(VENV),$(TESTS))  ## the tests that need a CUDA device; without a network: make test-gpu PYTHON=python3 VENV=
	$(if $(VENV),$(BIN)/python,$(PYTHON)) -m pytest -o addopts=--import-mode=importlib -m gpu tests/gpu  # pytest's plugins may be missing

lint: $(TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(TESTS)
	$(BIN)/mypy

audit:  ## known vulnerabilities of the locked packages, asked of PyPI, and what bandit finds in the code; in an environment of its own
	$(PYTHON) -m venv .audit && .audit/bin/pip install --quiet bandit pip-audit
	.audit/bin/bandit --quiet --recursive --configfile pyproject.toml sparsemem analysis
	.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

bench: $(READY)  ## everything that README's performance section states: `sparsemem bench --help`
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[compare]'
	$(BIN)/sparsemem bench step
	$(BIN)/sparsemem bench moe
	$(BIN)/sparsemem bench memory
	$(BIN)/sparsemem bench data
	$(BIN)/sparsemem bench eval
	$(BIN)/sparsemem bench fit
	$(BIN)/sparsemem bench sweep

format: $(TESTS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## resolve pyproject.toml anew, with a CPU build of torch at hand; it is pinned without its build's name: each platform takes its own
	$(PYTHON) -m venv .lock && .lock/bin/pip install --quiet pip-tools
	echo 'torch==$(TORCH)' > .lock/constraints.txt
	.lock/bin/pip-compile --quiet --extra dev $(EXTRAS:%=--extra %) --constraint .lock/constraints.txt --allow-unsafe --strip-extras --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock
	rm -rf .lock

clean:
	rm -rf .venv .audit runs .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed; set PYTHON=..., e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing packages into .venv as requirements.lock pins them: about 1 GB, a minute or more" >&2
	$(BIN)/pip install --quiet --constraint requirements.lock setuptools
	$(BIN)/pip install --quiet --constraint requirements.lock --no-build-isolation --editable .
	@touch $@

$(TESTS): $(READY)
	$(BIN)/pip install --quiet --requirement requirements.lock
	@touch $@
