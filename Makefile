# Two commands: `make demo` shows what rankfold does, `make test` checks that it does it.
# Both create the environment in .venv from requirements.lock first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test env

demo: env
	$(BIN)/rankfold demo

test: env
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 2

env: .venv/.made

.venv/.made: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch .venv/.made
