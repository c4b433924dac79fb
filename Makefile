# make demo | test | lint | docs | bench. Each sets up what it needs in .venv, once.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: help setup demo test lint docs bench clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   create .venv with firmly and its tests"
	@echo "make demo    train, certify, attack and report a deblurring network on photographs"
	@echo "make test    run the tests"
	@echo "make lint    ruff and pyright"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make bench   measure every claim, write benchmarks/results"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "firmly needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

# one stamp per extra: made again when the requirements change
.venv/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing firmly[$*] into .venv ..."
	@$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

setup: .venv/.installed-test

demo: setup
	$(BIN)/firmly run deblur

# one thread for each of the parallel processes, and none that spins while it waits
test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

bench: .venv/.installed-bench
	$(BIN)/firmly bench

clean:
	rm -rf docs/_build docs/api/generated .pytest_cache .ruff_cache .hypothesis .import_linter_cache
