# `make test` sets everything up on a machine with Python and make alone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint lab format lock clean

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: .venv/ready
	$(BIN)/jupyter lab --notebook-dir notebooks

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

lock: # the newest versions that agree, for every Python and platform we support (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev \
		--no-header --no-annotate pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv
