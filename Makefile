# `make help` lists the targets. Needs Linux, Python 3.11 or newer, pip and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An index with the CPU build of torch (saves several GB): the CPU index that PyTorch's installation page names.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help install demo up down check test test-full bench docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Install everything, at locked versions, into .venv

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; run make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $$(grep -c == requirements.lock) locked packages into $(VENV) (some minutes the first time)"
	@if [ -n "$(TORCH_INDEX)" ]; then \
		$(PIP) install --no-deps --extra-index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.lock)"; fi
	@$(PIP) install --no-deps -r requirements.lock
	@$(PIP) install --no-deps -e .
	@touch $@

demo: install ## Watch phantom scans become a store, an encoder and a benchmark table
	@$(BIN)/brainloom demo

up: install ## Start the Prefect server with its UI and the worker
	@$(BIN)/brainloom up

down: ## Stop them
	@if [ -x $(BIN)/brainloom ]; then $(BIN)/brainloom down; else echo "nothing is installed, nothing runs"; fi

check: install ## Lint, format, types and import contracts
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

test: check ## Check, then the fast tests
	@$(PYTEST) -m "not full" -n 2 --dist loadfile

test-full: install ## The slow tests: kills, S3, browser, long runs
	@$(PYTEST) -m full -n 2 --dist loadfile

bench: install ## Measure speed
	@$(BIN)/python -m bench
	@$(BIN)/python -m bench scale

docs: install ## Build the API reference into build/docs
	@$(BIN)/python docs/reference.py

clean: down ## Remove caches and the installation; keeps state/
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build ./*.egg-info
