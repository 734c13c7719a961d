# make train: simulate a cohort, train on it, show the result beside the best possible one.
# make test:  format, lint, types, every test.
# make soak:  ten minutes of killed processes, failing servers and random input; nothing may be lost.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test soak

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("behrt needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

train: $(VENV)/.installed
	$(BIN)/behrt train experiments/quickstart/experiment.yaml
	@echo 'To compare runs in MLflow: $(BIN)/behrt ui'

test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python experiments/reliability/measure.py soak
