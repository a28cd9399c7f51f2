# Everything a user types.  `make` alone lists the targets.
RECIPE ?= phantom
NPROC  ?= 1
ARGS   ?=
EXTRAS ?= dev,lora
PYTHON ?= python3

VENV   := .venv
BIN    := $(VENV)/bin
comma  := ,
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup teacher-cache train-student test check bench bench-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=name or file (default phantom)   NPROC=processes (default 1)   ARGS='--set section.key=value ...'"

setup: $(STAMP)  ## make .venv and install with exact versions; a no-op when nothing changed

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

teacher-cache: setup  ## stage one: run the frozen teacher once, write the cache
	@$(BIN)/python -m shared.pipeline teacher-cache "$(RECIPE)" --nproc $(NPROC) $(ARGS)

train-student: setup  ## stage two: train a student from the cache; makes the cache first when it is missing
	@$(BIN)/python -m shared.pipeline train-student "$(RECIPE)" --nproc $(NPROC) $(ARGS)

test: setup  ## all tests
	$(BIN)/python -m pytest

check: setup  ## format, lint, types, fast tests: before every commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

bench: setup  ## ratios and counts, measured side by side in one run
	$(BIN)/python -m tests.benchmarks

bench-gpu: setup  ## figures that need an NVIDIA GPU
	$(BIN)/python -m tests.benchmarks --gpu

clean:  ## remove what recipes and tools wrote here (the environment in .venv stays)
	rm -rf work .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find shared stage1_teacher stage2_student tests -name __pycache__ -type d -prune -exec rm -rf {} +
