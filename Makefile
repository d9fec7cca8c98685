# make quickstart   train, evaluate and compare BN and RefBN detectors in minutes on a laptop
# make test         the test suite
# make test-fast    the tests that are not marked slow, in under 90 seconds
# make lint         ruff: style and formatting
# make types        mypy
# make gpu-check    what only a GPU can show: kernels, costs, a verdict; in under 8 minutes
# make slurm-test   a matrix, preemption and srun on a real SLURM; installs Debian's slurm-wlm as root
# make docs         the documentation as a site, in site/; a link that leads nowhere is an error
# make setup        what all of them do first: .venv with everything, from PyPI

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= output/quickstart
# A worker takes up to 2 GB. The tests of a file stay together, because they share fixtures. Files run
# in the order of tests/conftest.py.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart test test-fast lint types docs gpu-check slurm-test clean

setup: $(VENV)/.complete

# The marker file comes last, so an interrupted set-up runs again; each step skips what is done.
$(VENV)/.complete: requirements.txt pyproject.toml setup.py dev/setup_detectron2.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing requirements into $(VENV) (the first time about 3 GB)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python dev/setup_detectron2.py
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	@$(BIN)/python -m refbn_d2 compare run Matrix/quickstart.yaml --jobs 2 --output $(OUTPUT)
	@$(BIN)/python -m refbn_d2 compare report --runs $(OUTPUT) --baseline BN --output $(OUTPUT)/report

test: setup
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: setup
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: setup
	@$(BIN)/python -m mypy

docs: setup
	@$(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

gpu-check: setup
	@$(BIN)/python dev/gpu_check.py --output output/gpu-check

slurm-test: setup
	@$(BIN)/python dev/slurm.py --install
	@$(BIN)/python -m pytest tests/experiments/test_slurm.py

clean:
	rm -rf $(VENV) build site *.egg-info
