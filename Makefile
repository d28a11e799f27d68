# Every target works first on a clean clone: it sets up .venv once, then again only when the
# project's description or its C++ sources change. Needs Python 3.10 or newer and a C++20 compiler.
#
#   make train    the main job: two ranks, generated Criteo-like data, a few minutes
#   make test     all tests; PYTEST_ARGS="tests/planner -k greedy" chooses
#   make lint     ruff, mypy --strict on the parts without torch
#   make bench    this machine's embedding speed
#   make clean    removes all that the other targets made, training runs excepted

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# More arguments for pip when it installs torch, such as the index of CPU-only or CUDA builds.
TORCH_ARGS ?=
EXTRAS ?= dev,tensorboard
PYTEST_ARGS ?=
# Processes that run tests; each starts up to four ranks. On two cores a third one cost more (814 s for
# all tests beside 707 s, when every rank still imported torch) than the waits of tests leave free.
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.shardlab-installed
BUILD_TOOLS := "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.26" ninja

.PHONY: train test lint bench clean
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(BIN)/shardlab train --demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" .ci/lint

bench: $(INSTALLED)
	$(BIN)/shardlab bench

$(INSTALLED): pyproject.toml $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment; install python3-venv" \
	  "or set PYTHON" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 10), \
	  f"ShardLab needs Python 3.10 or newer, found {sys.version}; set PYTHON"'
	@echo "setting up $(VENV): torch first, then ShardLab and its native library"
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
