# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# worksteal: an idle process takes tests from the other one, so that slow tests do not end up in one process.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all test-distributed test-faults test-gpu bench docs lint format clean help

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/  -/'

demo: $(VENV)/installed  ## install, run the quickstart experiment, print the comparison
	$(BIN)/moebench run experiments/quickstart.yaml
	$(BIN)/moebench compare experiments/quickstart.yaml
	@echo
	@echo "Where to look next (source $(BIN)/activate first):"
	@echo "  moebench ui                          curves and expert loads in the browser"
	@echo "  moebench list routers                what can be compared; moebench show switch explains one"
	@echo "  moebench compare switch gshard       any routers against the dense model"
	@echo "  results/experiments/quickstart/curves.png"

test: $(VENV)/installed-dev  ## the tests without those marked slow: seven to eleven minutes on two slow cores, less on faster ones
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/installed-dev  ## all tests, with all combinations and the long simulations (the UI test needs chromium)
	$(PYTEST) --hypothesis-profile=full

test-distributed: $(VENV)/installed-dev  ## the tests of several processes: meshes, torchrun, SLURM, processes that are killed or hang
	$(PYTEST) -n 2 --timeout 600 tests/distributed

test-faults: $(VENV)/installed-dev  ## kills, damage, full disks, broken trackers, processes that hang, strange environments
	$(PYTEST) --timeout 900 tests/faults

test-gpu: $(VENV)/installed-dev  ## the tests that need a CUDA device (MOEBENCH_TEST_DEVICE=cpu runs them without one)
	$(PYTEST) -m gpu tests/gpu tests/contract/test_execution.py

bench: $(VENV)/installed  ## speed of the layer, of each router, of a training step and of several processes, as ratios; with the libraries of the extra `peers` where installed
	$(BIN)/moebench bench layer
	$(BIN)/moebench bench router
	$(BIN)/moebench bench step
	$(BIN)/moebench bench parallel

docs: $(VENV)/installed  ## write docs/routers.md, docs/routers/, docs/configuration.md and docs/metrics.md from the registries and the schema
	$(BIN)/moebench show --all-routers --out docs
	$(BIN)/moebench show --all-options > docs/configuration.md
	$(BIN)/moebench list metrics --markdown > docs/metrics.md

lint: $(VENV)/installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
