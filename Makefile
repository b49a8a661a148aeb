PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

# One thread per process: the tests start several workers, and results must not depend on how many cores there are.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# DeepSpeed would otherwise try to compile CUDA extensions while it is installed.
export DS_BUILD_OPS := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup test test-slow test-all lint demo dry-run-sd3 bench-kernels bench-engine gpu-check clean

setup: $(STAMP)

# The install compiles the C kernels, so a change to them needs another install.
$(STAMP): pyproject.toml $(wildcard unlearn_kernels/csrc/*.[ch] unlearn_kernels/csrc/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	touch $(STAMP)

# Every component, and one small night on Ray, in two processes. With a selection, such as ARGS=tests/cli, one process
# runs exactly that, slow tests included.
test: $(STAMP)
	$(BIN)/python -m pytest $(or $(ARGS),--numprocesses=2 -m "not slow")

# What `make test` leaves out: faults, more nights, Triton's builds and interpreter, every combination.
test-slow: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=2 -m slow

test-all:
	$(MAKE) test
	$(MAKE) test-slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

demo: $(STAMP)
	$(BIN)/python -m expunge.jobs.demo

# A night with a model of SD3-medium's true size and random weights: 16 GB of disk in /tmp/sd3, and 16 GB of memory.
# It may be killed and started again; ARGS='--size tiny --pixels 64' is the same in small.
dry-run-sd3: $(STAMP)
	$(BIN)/python -m tests.dry_run $(ARGS)

bench-kernels: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_kernels $(ARGS)

bench-engine: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_engine $(ARGS)

# For a machine with one NVIDIA GPU, with or without the network: see `ARGS=--needs`, and `ARGS=--rehearse` without a GPU.
# No prerequisite: the environment there may have no more than torch, triton and what the steps need.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.gpu_check $(ARGS)

# Build products and caches only: nobody's data lives in the checkout.
clean:
	rm -rf build dist unlearn_kernels/libunlearn_kernels.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache $(STAMP)
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
	find . -path ./.venv -prune -o -name '*.egg-info' -type d -exec rm -rf {} +
