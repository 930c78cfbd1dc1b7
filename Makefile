# Every target makes its own environment in .venv from requirements.lock; only Python 3.11 to 3.13 and make are assumed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TORCH := 2.13.0

.PHONY: demo test test-all test-gpu lint types bench format lock clean

demo: $(READY)  ## run the quick allocation study and open the way to its report
	$(BIN)/sparsemem run sweeps/allocation-quick.yaml

test: $(READY)  ## the tests, at most ten minutes on two cores
	$(BIN)/python -m pytest sparsemem analysis tests

test-all: $(READY)  ## the slow and fault tests too
	$(BIN)/python -m pytest -m "not gpu" sparsemem analysis tests

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## the training step against a dense model and transformers; ways of dispatch to experts; memories against routed experts and the machine's own speed; a loss surface against SciPy
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[compare]'
	$(BIN)/sparsemem bench step
	$(BIN)/sparsemem bench moe
	$(BIN)/sparsemem bench memory
	$(BIN)/sparsemem bench fit

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## resolve pyproject.toml anew, with a CPU build of torch at hand; it is pinned without its build's name: each platform takes its own
	$(PYTHON) -m venv .lock && .lock/bin/pip install --quiet pip-tools
	echo 'torch==$(TORCH)' > .lock/constraints.txt
	.lock/bin/pip-compile --quiet --extra dev --constraint .lock/constraints.txt --allow-unsafe --strip-extras --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock
	rm -rf .lock

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed; set PYTHON=..., e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing $$(grep -c == requirements.lock) locked packages into .venv: about 1 GB, a minute or more" >&2
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
