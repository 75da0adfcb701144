# Each target works alone on a fresh machine: it makes .venv, installs what it needs, then runs.
#   make setup     install REFRACTOR into .venv          make test      lint, floors and the quick tests
#   make pilot     documents → a trained, evaluated MoE  make test-all  every test that this machine can run
#   make lint      ruff and the floors                   make clean     remove .venv and caches
# PYTHON=/path/to/python3 picks the interpreter; CONSTRAINTS=constraints/x.txt the tested versions; JOBS=n the test processes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
CONSTRAINTS ?= constraints/$(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu).txt
JOBS ?= 2
RUN := .venv/bin/python -m
# Without warnings: an index that lacks one of the packages is no news. Errors are shown.
PIP_INSTALL := $(RUN) pip install -qq --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS)
SOURCES := setup.py pyproject.toml $(wildcard constraints/*.txt)

.PHONY: help setup pilot test test-all lint clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "REFRACTOR needs Python 3.11 or newer; none is on PATH. Install one, or: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; fi
	@echo "make: creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments with pip (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/.setup: $(SOURCES) | .venv/bin/python
	@echo "make: installing REFRACTOR with $(CONSTRAINTS) (about a minute; PyTorch is the large part)"
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.test: $(SOURCES) | .venv/bin/python
	@echo "make: installing REFRACTOR and what its tests need with $(CONSTRAINTS) (about a minute; PyTorch is the large part)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@ .venv/.setup

setup: .venv/.setup
	@echo "make: ready. Try '. .venv/bin/activate && refractor --help', or 'make pilot'."

pilot: .venv/.setup
	@bash launch/pilot.sh

lint: .venv/.test
	@$(RUN) ruff check .
	@PYTHONPATH=.:kernels .venv/bin/lint-imports --no-cache --no-logo

test: lint
	@$(RUN) pytest -n $(JOBS) -m "not slow and not gpu"

test-all: lint
	@$(RUN) pytest -n $(JOBS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
