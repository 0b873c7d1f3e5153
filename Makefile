# Two promises on a fresh machine, each doing its own set-up:
#   make quickstart   private fine-tuning of a small real model, with a report to look at
#   make test         everything the project checks about itself in pytest
# And `make check`: formatting, lint, types; `make docs`: the site of docs/, in build/site.

PYTHON ?= python3
VENV ?= .venv
# OpenFHE's wheels are for two interpreters only, so it has an environment of its own, without torch.
OPENFHE ?= .venv-openfhe
OPENFHE_PYTHON ?= $(firstword $(wildcard /usr/bin/python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test openfhe check docs peers benchmark setup clean

quickstart: $(READY)
	$(BIN)/python -m scenarios.quickstart

# A file's tests share what they set up, so a file goes to one process, in the order of
# tests/conftest.py.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	@if [ -e $(OPENFHE)/.ready ]; then $(OPENFHE)/bin/python -m pytest tests/openfhe; \
	else echo "OpenFHE: its tests were skipped; make openfhe makes the environment they run in"; fi

openfhe: $(OPENFHE)/.ready

$(OPENFHE)/.ready: pyproject.toml constraints.txt Makefile
	@test -n "$(OPENFHE_PYTHON)" || { echo "OpenFHE: no CPython 3.10 found; name one by \
	make openfhe OPENFHE_PYTHON=..."; exit 1; }
	$(OPENFHE_PYTHON) -m venv $(OPENFHE)
	$(OPENFHE)/bin/pip install --quiet --constraint constraints.txt openfhe numpy numba cryptography \
	  simpy pytest pytest-timeout
	$(OPENFHE)/bin/python -c "import openfhe"
	touch $(OPENFHE)/.ready

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --quiet --config-file docs/site/mkdocs.yml
	@echo "build/site/index.html; for its search: $(BIN)/python -m http.server --directory build/site"

# Other libraries, for `python -m benchmarks.peers` alone.
peers: $(READY)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --constraint constraints.txt numpy tenseal \
	  concrete-ml-extensions desilofhe

# Everything that the pages quote of a machine like this one; about an hour, goes on where it was.
benchmark: $(READY)
	$(BIN)/python -m benchmarks.everything

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(OPENFHE) .venv-peers runs build/site .mypy_cache .ruff_cache .pytest_cache .hypothesis
