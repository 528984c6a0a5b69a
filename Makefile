# The one list of commands. Each makes its own virtual environment when there is none:
# `make demo` and `make test` are all a fresh machine needs.
#   make PYTHON=python3.12 ...   another interpreter
#   make VENV=/elsewhere ...     another place for the environment
#   make PIP_FLAGS=... ...       further options of pip install

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.done

.PHONY: help install demo test test-all lint format bench docs wheel check

help:
	@echo "make demo      pretrain on generated images, print a table, save pictures"
	@echo "make test      the quick tests      make test-all  every test"
	@echo "make lint      ruff and mypy        make format    rewrite the layout"
	@echo "make check     lint + test          make bench     side-by-side measurements"
	@echo "make docs      rewrite docs/config.md from the schema"
	@echo "make wheel     build dist/          make install   only the environment"

install: $(READY)

demo: $(READY)
	$(BIN)/dino-kd demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/everything.py --write docs/results.md

docs: $(READY)
	$(BIN)/python -m dino_kd.config > docs/config.md.new && mv docs/config.md.new docs/config.md

wheel: $(READY)
	$(BIN)/python -m build && $(BIN)/python -m pytest tests/test_packaging.py

check: lint test

$(READY): setup.py
	@command -v $(PYTHON) > /dev/null || { \
	  echo "error: $(PYTHON) is not installed; dino_kd needs Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: dino_kd needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu install the" \
	       "package python3-venv (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	@touch $(READY)
