# Everything a user types.  `make` alone lists the targets.
RECIPE ?= phantom
NPROC  ?= auto
ARGS   ?=
EXTRAS ?= lora
PYTHON ?= python3
NUM_WORKERS ?= logical
MINUTES ?= 60

VENV := .venv
BIN  := $(VENV)/bin

# What must be in the environment: what the user asks for, and what the goals need beside it.  The stamp holds what is
# in it, all that was ever asked for.  So pip runs when something is missing or one of the two files has other content,
# and then installs everything that was there before; otherwise nothing reaches for the network.  Modules are compiled when
# they are first imported, as most never are; at once where Python is told not to keep what it compiles, since otherwise
# each command compiles thousands anew.
comma     := ,
empty     :=
space     := $(empty) $(empty)
STAMP     := $(VENV)/.installed
FOR_TESTS := test lora report s3 tracking
FILES     := files-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))
WANTED    := $(subst $(comma),$(space),$(EXTRAS)) \
             $(if $(filter test torture bench-gpu,$(MAKECMDGOALS)),$(FOR_TESTS)) $(if $(filter bench-gpu,$(MAKECMDGOALS)),peers) \
             $(if $(filter torture,$(MAKECMDGOALS)),fuzz) \
             $(if $(filter bench-real,$(MAKECMDGOALS)),real-weights) $(if $(filter check lint,$(MAKECMDGOALS)),dev $(FOR_TESTS))
INSTALLED := $(shell cat $(STAMP) 2>/dev/null)
MISSING   := $(filter-out $(INSTALLED),$(FILES) $(WANTED))
UNION     := $(sort $(filter-out files-%,$(INSTALLED)) $(WANTED))

.DEFAULT_GOAL := help
.PHONY: help setup install teacher-cache train-student rounds test torture lint check bench bench-gpu bench-real clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=name or file (default phantom)   NPROC=processes (default: one for each GPU)   ARGS='--set section.key=value ...'"
	@echo "  EXTRAS=lora,report,s3,tracking,vision   PYTHON=python3.12, to make .venv with"

setup: $(if $(MISSING),install)  ## make .venv and install with exact versions; a no-op when nothing changed
	@:

install: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 \
	    $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile) -c constraints.txt \
	    -e ".$(if $(UNION),[$(subst $(space),$(comma),$(UNION))])"
	@echo $(FILES) $(UNION) > $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: Python 3.11 or later is needed, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	        "Install one, and name it: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) cannot make environments. Install its venv module (Debian, Ubuntu: apt install" \
	        "python3-venv), or name another Python: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

teacher-cache: setup  ## stage one: run the frozen teacher once, write the cache
	@$(BIN)/python -m shared.pipeline teacher-cache "$(RECIPE)" --nproc $(NPROC) $(ARGS)

train-student: setup  ## stage two: train a student from the cache; makes the cache first when it is missing
	@$(BIN)/python -m shared.pipeline train-student "$(RECIPE)" --nproc $(NPROC) $(ARGS)

rounds: setup  ## train a student, let it write, capture the teacher on that, train on the mixture, and again
	@$(BIN)/python -m shared.pipeline rounds "$(RECIPE)" --nproc $(NPROC) $(ARGS)

test: setup  ## all tests, on NUM_WORKERS processes (default: as many as there are cores)
	$(BIN)/python -m pytest -n $(NUM_WORKERS) --dist loadfile --no-loadscope-reorder

torture: setup  ## hard conditions by chance, for MINUTES (default 60): kills, damage, small disks; SEED=N repeats
	$(BIN)/python -m tests.torture --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

lint: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint  ## format, lint, types, fast tests: before every commit
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n $(NUM_WORKERS) --dist loadfile --no-loadscope-reorder

bench: setup  ## ratios and counts, measured side by side (ARGS='--only NAME', ARGS='--record NAME' for docs/)
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-gpu: setup  ## figures that need an NVIDIA GPU, in 25 minutes (ARGS=--tiny tries it on a CPU)
	$(BIN)/python -m tests.benchmarks.bench_gpu $(ARGS)

bench-real: setup  ## a pretrained teacher of 262,144 ids and its students, in a day (ARGS=--tiny tries it)
	$(BIN)/python -m tests.benchmarks.bench_real_weights $(ARGS)

clean:  ## remove what recipes and tools wrote here (the environment in .venv stays)
	rm -rf work .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
