# make quickstart   set up and run the main job end to end on the embedded model
# make test         set up and run the tests
# make check        format, lint and types
# make test-slow    the tests that take longer than a few seconds each
# make format       rewrite the files in the house's format

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test test-slow check format clean

quickstart: .venv/.installed-all
	$(BIN)/lowrank quickstart --overwrite

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow -q

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "lowrank needs Python 3.11 or newer (set PYTHON=…)"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed-all: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[all]'
	@touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/.installed-all

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
