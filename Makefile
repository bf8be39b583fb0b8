# `make demo` and `make test` work on a fresh clone: each does its own set-up.

# A set-up environment remembers its device, so that `make test` after `make setup DEVICE=gpu`
# does not go back to the CPU.
DEVICE ?= $(shell cat .venv/device 2>/dev/null || echo cpu)
PYTHON := .venv/bin/python
STAMP := .venv/ready-$(DEVICE)

# No model hub is needed, and nothing here phones home.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export TOKENIZERS_PARALLELISM := false
# GB. vLLM's default on the CPU is half of the memory, which the servers need too.
export VLLM_CPU_KVCACHE_SPACE ?= 1

.PHONY: help setup demo test test-long test-ops check docs soak bench clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and the bundled model; once done it costs nothing (DEVICE=cpu|gpu)
	@:

$(STAMP): pyproject.toml constraints.txt overrides.txt tools/setup.sh tools/preflight.py
	@sh tools/setup.sh $(DEVICE)
	@touch $@

demo: $(STAMP)  ## run the main job on real input
	@$(PYTHON) -m workers.demo

check: $(STAMP)  ## style and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

test: check  ## every check: style, types, unit, integration, acceptance
	@$(PYTHON) -m pytest

test-long: $(STAMP)  ## the tests that take minutes each
	@$(PYTHON) -m pytest -m long

# Prometheus comes from the system: Debian's package has the server and promtool.
test-ops: $(STAMP)  ## try a real Prometheus on a real worker
	@command -v prometheus promtool >/dev/null || { echo "make test-ops needs Prometheus: apt-get install prometheus" >&2; exit 1; }
	@$(PYTHON) -m pytest -m ops tests/ops

docs: $(STAMP)  ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# Faults for so long; PROMPTMILL_FAULT_SEED repeats a run.
MINUTES ?= 30

soak: $(STAMP)  ## kill, stop and cut off things for MINUTES=30, print a table of faults
	@$(PYTHON) -m tests.acceptance.faults --minutes $(MINUTES)

bench: $(STAMP)  ## measure, print a table, write benchmarks.json
	@$(PYTHON) -m tests.benchmarks

clean:  ## remove the environment and what the tools left
	rm -rf .venv .setup .mypy_cache .ruff_cache .hypothesis dist build site benchmarks.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
