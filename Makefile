# make quickstart   train, evaluate and compare BN and RefBN detectors in minutes on a laptop
# make test         the test suite
# make setup        what both do first: .venv with everything, from PyPI

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= output/quickstart

.PHONY: setup quickstart test lint clean

setup: $(VENV)/.complete

# The marker comes last, so an interrupted set-up runs again; each step skips what is done.
$(VENV)/.complete: requirements.txt setup.py dev/setup_detectron2.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing requirements into $(VENV) (the first time about 3 GB)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python dev/setup_detectron2.py
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	@$(BIN)/python tools/compare.py run configs/Matrix/quickstart.yaml --jobs 2 --output $(OUTPUT)
	@$(BIN)/python tools/compare.py report --runs $(OUTPUT) --baseline BN --output $(OUTPUT)/report

test: setup
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
