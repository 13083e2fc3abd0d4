# Two commands: `make demo` shows what rankfold does, `make test` checks that it does it.
# Both create the environment in .venv from requirements.lock first, as do `make docs`, the documentation as a site, and
# `make wheel`, the packages that are published, tried in an empty environment. `make matrix` runs the tests on other
# versions of Python and torch.

PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE :=  # packages are compiled as they are imported, once, whatever was set outside

.PHONY: demo test docs wheel matrix env

demo: env
	$(BIN)/rankfold demo

test: env
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 2 --dist worksteal
	$(BIN)/mkdocs build --quiet

docs: env
	$(BIN)/mkdocs build

wheel: env
	$(BIN)/python tools/try_packages.py

matrix: env
	$(BIN)/python tools/matrix.py

env: .venv/.made

.venv/.made: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch .venv/.made
