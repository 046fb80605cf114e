# `make demo`, `make ui`, `make check`, `make test`. The only prerequisite is Python 3.11 or 3.12.
# TORCH_INDEX=URL  installs torch from that package index, for example a CUDA build.
# PYTHON=python3.12  selects the interpreter.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH := $(shell grep -E '^torch==' constraints.txt)
export DAGSTER_HOME := $(CURDIR)/dagster_home

.PHONY: help install demo check lint types fast pages test ui clean

help:
	@echo "make demo   train the demo model and create it in Ollama (minutes, on a CPU)"
	@echo "make ui     start the Dagster UI on http://127.0.0.1:3000"
	@echo "make check  linters, type checker, fast tests (less than a minute)"
	@echo "make test   everything (less than 25 minutes)"
	@echo "make clean  delete what was built (dagster_home), keep the environment"

install: .venv/.installed

# torch first: as a dependency of another package, pip would install a build with gigabytes of CUDA libraries.
.venv/.installed: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and was not found; set PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	$(PIP) --index-url $(TORCH_INDEX) $(TORCH)
else
	command -v nvidia-smi >/dev/null || $(PIP) $(TORCH)+cpu 2>/dev/null || true
	$(PIP) $(TORCH)
endif
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/finetune run demo

# the type checker takes one core, the tests the other
check: .venv/.installed-dev
	@$(MAKE) --no-print-directory --jobs 2 --output-sync lint types fast

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/basedpyright

fast: .venv/.installed-dev
	$(BIN)/pytest --fast

# docs/ pages that are made from the code alone
pages: .venv/.installed-dev
	$(BIN)/python -m docs.pages

# the demo alone, last: its training needs all cores
test: lint types
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/whole/test_demo.py
	$(BIN)/pytest tests/whole/test_demo.py

ui: install
	$(BIN)/dagster dev -h 127.0.0.1 -p 3000

clean:
	git clean -fdxq dagster_home
