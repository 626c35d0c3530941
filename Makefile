# Four words: demo, test, lint, bench. Each makes the virtual environment it needs and is quick when that stands.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint bench

demo: $(VENV)/ready
	$(PY) tools/demo.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(PY) benchmarks/training_step.py
	$(PY) benchmarks/load_14b.py --layers 2

# torch first: what depends on it then keeps the build that is there.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
