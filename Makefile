# make demo | test | lint | bench: each sets up what it needs, from a bare clone with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench train clean

demo: $(VENV)/installed
	$(BIN)/mechanistic demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks

# Retrains the bundled model from scratch (about 8 CPU-minutes).
train: $(VENV)/installed
	$(BIN)/python -m mechanistic.capture.train_spatial_tiny

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
