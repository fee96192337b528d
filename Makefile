# Everything runs in .venv, which is made on first use. On a machine with an NVIDIA GPU, drop torch's line from
# constraints.txt to get a CUDA build.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/installed  ## the whole workflow on a task built on the spot, in a few minutes; opens nothing, needs no network
	$(BIN)/token-pruning demo

test: .venv/installed  ## all tests
	$(BIN)/pytest -n 2

lint: .venv/installed  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/installed  ## dense against pruned on the clock, evaluation and training step
	$(BIN)/python benchmarks/core.py

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard src/token_pruning/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
