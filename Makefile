# make test and make demo set themselves up: a fresh clone needs nothing but a Python from 3.12 to 3.13 and make.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# One thread per process: the tests and the demo start several processes, which would otherwise fight over the cores.
test test-fast soak test-gpu demo: export OMP_NUM_THREADS = 1

.PHONY: help setup demo test test-fast soak test-gpu lint clean

help:
	@echo "make setup      make $(VENV) and install hymeg with its pinned dependencies (PYTHON=/path/to/python3.12 to choose the interpreter)"
	@echo "make demo       a small Hy-MT2 trains on four processes, changes its layout and is fine-tuned: some minutes, on CPU"
	@echo "make test       the whole test suite, on CPU"
	@echo "make test-fast  the unit tests, under two minutes"
	@echo "make soak       what is long by nature and left out of make test; then an hour of kills and flipped bits (tools/soak.py)"
	@echo "make test-gpu   the tests that need a GPU and Transformer Engine (docs/gpu.md), in the environment that has them (PYTHON=... to choose it)"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make clean      remove $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile tools/setup.sh
	@bash tools/setup.sh $(VENV) $(PYTHON)
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

# Several tests at a time: most use one core, or wait.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4

test: setup
	$(PYTEST) --durations 10

test-fast: setup
	$(PYTEST) tests/unit

soak: setup
	$(PYTEST) -m soak --durations 10
	$(BIN)/python tools/soak.py

# Transformer Engine is compiled for the machine's own torch: no set-up of ours.
test-gpu:
	$(or $(PYTHON),python3) -m pytest tests/gpu -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
