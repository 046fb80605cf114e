# Three doors: `make demo`, `make test`, `make ui`. Nothing to do before them but to have Python 3.11 or 3.12.
# TORCH_INDEX=URL  takes torch from that package index (a CUDA build, say).
# PYTHON=python3.12  chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH := $(shell grep -E '^torch==' constraints.txt)
export DAGSTER_HOME := $(CURDIR)/dagster_home

.PHONY: help install demo test ui clean

help:
	@echo "make demo   train the demo model and put it into Ollama (minutes, on a CPU)"
	@echo "make test   ruff, type checker, tests"
	@echo "make ui     the Dagster UI on http://127.0.0.1:3000"
	@echo "make clean  forget what was made (dagster_home), keep the environment"

install: .venv/.installed

# torch first: asked for by another package, pip would take a build with gigabytes of CUDA libraries.
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

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/whole/test_demo.py
	$(BIN)/pytest tests/whole/test_demo.py

ui: install
	$(BIN)/dagster dev -h 127.0.0.1 -p 3000

clean:
	git clean -fdxq dagster_home
