# Two commands matter: `make demo` and `make test`. Both make .venv, install what they need once, and work without
# network from then on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
ASSETS := gsa_jax/assets
MODEL := $(ASSETS)/story-neo
# Exactly one version of PyTorch, so that a CPU build already at hand is taken instead of gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Most of the time of a test is compiling small programs: they are hardly optimised, and kept for the next run. Tests of
# a file share a process, and with it programs and fixtures, until the other process has nothing left to do.
PYTEST := JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(BIN)/python -m pytest -n 2 --dist worksteal

# A plain copy of the package, because tools that read code cannot follow the editable install to convert/ and train/.
# build/lib keeps modules that have been deleted since, and setuptools would pack them.
PLAIN_COPY = rm -rf build/lib build/typecheck && $(BIN)/pip install --quiet --no-deps --target build/typecheck .

.PHONY: demo test test-slow test-benchmarks fuzz audit lint docs wheel-test newest-test accelerators accelerators-quick clean

demo: $(VENV)/.demo
	rm -rf $(DEMO)
	$(BIN)/gsa convert $(MODEL) $(DEMO)/plain
	$(BIN)/gsa verify $(MODEL) $(DEMO)/plain --text tests/data/stories.txt
	$(BIN)/gsa convert $(MODEL) $(DEMO)/splats --splats-from $(MODEL)-splats
	$(BIN)/gsa eval $(DEMO)/splats --text $(ASSETS)/told.txt
	@for window in all 64 0; do \
		echo; echo "--- a story with a window of: $$window"; \
		$(BIN)/gsa generate $(DEMO)/splats --window $$window --stream \
			--prompt "Once upon a time, there was a little girl named Lily." \
			--temperature 0.6 --top-p 0.9 --seed 2 || exit 1; \
	done

test: $(VENV)/.test
	$(PYTEST) --strict-run -m "not slow" --durations=20

# Runs that are killed, terminated or spread over processes, and what else takes long.
test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not benchmarks" --durations=20

# Benchmark scripts from end to end, in small; CI has no time for them.
test-benchmarks: $(VENV)/.test
	$(PYTEST) -m benchmarks

# Every reader, given damaged and hostile inputs; one JSON line for each reader in $(FUZZED).
FUZZ ?= 100000
FUZZED ?= build/fuzz.jsonl
FUZZ_SEED ?= $(shell date +%Y%m%d)
fuzz: $(VENV)/.test
	mkdir -p $(dir $(FUZZED))
	$(PYTEST) --dist load -m slow tests/fuzz --fuzz-examples $(FUZZ) --fuzz-seed $(FUZZ_SEED) --fuzz-report $(FUZZED)

# Known vulnerabilities, licences and a bill of materials, at the oldest and newest versions; needs the network.
audit:
	bash .ci/audit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PLAIN_COPY)
	$(BIN)/basedpyright

# The documentation as a site, build/site/index.html; a link to nothing, or anything from another server, is an error.
docs: $(VENV)/.docs
	$(PLAIN_COPY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel-test: $(VENV)/.test
	bash .ci/wheel-test

newest-test:
	bash .ci/newest-test

# What TPUs' and GPUs' own compilers say; no chip is needed, Linux on x86-64 is. Without optimisations off: programs are
# compiled as users run them.
accelerators: build/accelerators/.installed
	build/accelerators/bin/python -m pytest -n 2 --accelerators tpu,cuda -m accelerators tests/accelerators

accelerators-quick:
	bash .ci/accelerators

build/accelerators/.installed: pyproject.toml
	rm -rf build/accelerators
	mkdir -p build
	$(PYTHON) -m venv build/accelerators
	build/accelerators/bin/pip install --quiet --editable '.[test-without-pytorch]'
	build/accelerators/bin/pip install --quiet --editable '.[tpu-compiler,gpu-compiler]'
	touch $@

clean:
	rm -rf build dist .jax_cache *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.demo
	$(BIN)/pip install --editable '.[docs]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable '.[test]'
	# transformers 5 lives beside the pinned 4.57, for the tests that load an export with it.
	rm -rf $(VENV)/transformers5
	$(BIN)/pip install --target $(VENV)/transformers5 'transformers>=5,<6'
	touch $@ $(VENV)/.demo
