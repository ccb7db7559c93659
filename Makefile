# Every target works from a bare clone: it makes .venv first, and a second run installs nothing.
#
#   PYTHON=python3.12   interpreter of .venv (>= 3.10; only read when .venv is made)
#   TORCH="torch==2.13.0"   the torch requirement, instead of the choice by GPU
#   ARGS="--help"       handed to `archer-fast train`, to pytest by test, test-all and bench, or to scripts/fuzz.sh

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install train reproduce test test-all test-pythons test-ops-alone test-interpreter test-cpp test-python test-vllm sanitize fuzz bench lint format clean

PYTHON ?=
TORCH ?=
ARGS ?=
BIN := .venv/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/python/*.cpp csrc/python/*.h)
CPP_ALL := $(CPP) $(wildcard csrc/tests/*.cpp csrc/tests/*.h csrc/fuzz/*.cpp csrc/fuzz/*.h benchmarks/*.cpp)

help:
	@printf '%s\n' \
	  'make train      install, then train the default agent   (ARGS="..." for archer-fast train)' \
	  'make reproduce  the comparison of docs/reproduce/; resumes what was stopped' \
  'make test       every check but the slow tests          (ARGS="..." for pytest)' \
	  'make test-all   every check, slow tests too; those of a GPU where there is one' \
	  'make test-vllm  rollouts by vLLM on the CPU; installs it  (ARGS="..." for pytest)' \
	  'make sanitize   the C++ tests under the address, undefined-behaviour and thread sanitizers' \
	  'make fuzz       the fuzz targets, ten minutes each      (ARGS="60" for 60 seconds)' \
	  'make bench      the benchmarks: an hour or more, on a machine that does nothing else' \
	  'make lint       formatting, ruff, clang-format, types' \
	  'make format     rewrite the sources in their format' \
	  'make clean      remove what was built; .venv stays'

# Stamps: what a file of .venv was made from. `run` trains, `dev` checks.
.venv/.run: pyproject.toml scripts/install.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" scripts/install.sh run
	@touch $@

.venv/.dev: .venv/.run
	@scripts/install.sh dev
	@touch $@

.venv/.built: .venv/.run setup.py CMakeLists.txt $(CPP)
	@scripts/install.sh build
	@touch $@

install: .venv/.run .venv/.built

train: install
	@$(BIN)/archer-fast train $(ARGS)

# ALGORITHMS, SEEDS, FIRST_SEED, TRAJECTORIES_10 and TRAJECTORIES_32 in the environment change what is compared.
reproduce: install
	@scripts/reproduce.sh

test: lint test-cpp test-ops-alone test-pythons test-interpreter test-python

test-all: lint test-cpp test-ops-alone test-pythons test-interpreter test-vllm
	@$(BIN)/pytest $(ARGS)

# A process a core, files whole; more threads than cores is what makes torch slow here.
test-python: .venv/.dev .venv/.built
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n auto --dist loadfile $(ARGS)

# The part without torch, on the oldest and the newest Python of this machine.
test-pythons:
	@scripts/test_pythons.sh

# archer_fast.ops with nothing but torch installed, in an environment of its own.
test-ops-alone: .venv/.built
	@scripts/test_ops_alone.sh

# The Triton kernels without a GPU; a process of its own, because the switch is read when they are imported.
test-interpreter: .venv/.dev .venv/.built
	@echo "== Triton kernels in the interpreter"
	@TRITON_INTERPRET=1 $(BIN)/pytest -q tests/interpreter

# Rollouts by vLLM on the CPU, in an environment of its own (.venv-vllm, about 1 GB to fetch).
test-vllm: .venv/.run .venv/.built
	@scripts/test_vllm.sh $(ARGS)

test-cpp: .venv/.run
	@scripts/test_cpp.sh

# Not part of `make test`: ten times slower, and GCC's sanitizers are no part of every machine's compiler.
sanitize: .venv/.dev
	@scripts/sanitize.sh

# Needs clang's libFuzzer. What it finds is kept, and replayed by `make test`.
fuzz: .venv/.dev .venv/.built
	@scripts/fuzz.sh $(ARGS)

bench: .venv/.dev .venv/.built
	@$(BIN)/pytest benchmarks/bench_*.py --benchmark-only --benchmark-autosave --benchmark-storage=file://.benchmarks $(ARGS)

lint: .venv/.dev .venv/.built
	@echo "== ruff, clang-format, mypy"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_ALL)
	@$(BIN)/mypy --strict archer_fast

format: .venv/.dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP_ALL)

clean:
	rm -rf build dist *.egg-info .venv-* .venv/.built archer_fast/*.so .benchmarks .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
