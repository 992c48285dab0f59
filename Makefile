# make test                      the whole test suite, in an environment of its own (.venv)
# make demo                      trains on MovieLens and writes demo-output/report.html
# make lint                      ruff, mypy and clang-format
# make venv EXTRA=dev            only the environment
# make test PYTHON=python3.13    with another Python, 3.10 or newer
# make test TESTFLAGS="-k trie"  part of the suite

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= test
JOBS ?= auto
TESTFLAGS ?=
# Installed without its requirements: it declares numpy<2 and runs on newer versions.
TORCHGFN := torchgfn==2.4.1

BIN := $(VENV)/bin
# What a reinstallation would pick up; Python files are read in place.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: venv test demo lint clean

venv: $(VENV)/.installed-$(EXTRA)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -rs -m "slow or not slow" --numprocesses $(JOBS) $(TESTFLAGS)

demo: $(VENV)/.installed-test
	$(BIN)/gflowgr demo --output demo-output --overwrite

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.hpp tests/fuzz/*.cpp tests/fuzz/*.hpp

clean:
	rm -rf $(VENV) build dist *.egg-info gflowgr/_core*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1), needs Python 3.10 or newer" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,examples]'
	$(BIN)/python -m pip install --no-deps $(TORCHGFN)
	touch $(VENV)/.installed-test $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,examples]'
	$(BIN)/python -m pip install --no-deps $(TORCHGFN)
	touch $@
