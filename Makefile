# Fresh clone: `make demo` or `make test`; each first makes .venv with the pinned dependencies.
# Needs Python 3.11 or newer with pip. Another interpreter: `make PYTHON=python3.12 install`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-deploy lint bench chaos clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Pinned builders first, then everything with them: no build downloads anything of its own.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(INSTALLED) ## .venv with the pinned dependencies; again only when they change

$(INSTALLED): pyproject.toml constraints.txt Makefile $(wildcard compat/pycosat/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "gym_queue needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.11 install" >&2; \
	  exit 1; }
	@rm -f $@
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Creating $(VENV)"; \
	  if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv --clear $(VENV); \
	  elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -m venv --clear --without-pip $(VENV); \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check \
	      --constraint constraints.txt pip; \
	  else \
	    echo "'$(PYTHON)' has neither ensurepip nor pip; on Debian: apt-get install python3-pip" >&2; exit 1; \
	  fi; \
	fi
	@echo "Installing the pinned dependencies into $(VENV) (some minutes the first time)"
	@$(PIP) install --constraint constraints.txt pip setuptools hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation ./compat/pycosat --editable '.[hf,dev]'
	@touch $@

demo: install ## collect 256 rollouts of a small real model into runs/demo
	@rm -rf runs/demo && mkdir -p runs/demo
	$(BIN)/submit-rollouts --environment 'reasoning_gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2' \
	  --size 64 --samples 4 --seed 1 --model hf:examples/tiny-arithmetic/model -o runs/demo/rollouts.jsonl

test: lint ## lint, then the whole suite
	$(BIN)/python -m pytest

test-deploy: install ## compose/ on a real Docker engine; as root on Debian, it installs what is missing
	$(BIN)/python -c 'import playwright' 2>/dev/null || $(PIP) install --constraint constraints.txt 'playwright<2'
	tests/deploy/prepare.sh $(BIN)/python
	$(BIN)/python -m pytest tests/deploy

lint: install ## style, types, and who may import whom
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

bench: install ## what the road costs, beside other queues; BENCH='--quick' for three minutes
	$(BIN)/python -m benchmarks $(BENCH)

SEED ?= 1
MINUTES ?= 10

chaos: install ## kill and cut for MINUTES=10 from SEED=1 on; SCENARIO=... plays one only
	$(BIN)/python -m tests.chaos.soak --seed $(SEED) --minutes $(MINUTES) $(if $(SCENARIO),--scenario $(SCENARIO))

clean: ## remove what can be made again; keeps runs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
