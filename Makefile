# make train: simulate a cohort, train on it, show the result beside the best possible one.
# make test:  format, lint, types, every test but the slow ones.
# make bench: speed and memory beside Hugging Face and the guide's recipe, in some fifteen minutes on two cores.
# make bench-quality: seconds until 90% of what can be learned is learned, beside the same, in up to an hour.
# make soak:  the slow tests, and ten minutes of killed processes, failing servers and random input; nothing may be lost.
# make image-check: build the image, by Docker or without a daemon by buildah; train, stop and go on in it.
# make stack-check: the services of compose.yaml without Docker; twelve trials while PostgreSQL restarts and MLflow is killed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# synpuf-meds as it comes; without it, only the simulated cohort is trained on
SYNPUF ?= $(wildcard ../shared/data/synpuf-meds)
RECORDS := $(if $(SYNPUF),--synpuf $(SYNPUF))
MEASURE := $(BIN)/python -W ignore experiments/throughput/measure.py

.PHONY: train test bench bench-quality soak image-check stack-check

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("behrt needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

train: $(VENV)/.installed
	$(BIN)/behrt train experiments/quickstart/experiment.yaml
	@echo 'To compare runs in MLflow: $(BIN)/behrt ui'

test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder -m 'not slow'

bench: $(VENV)/.installed-bench
	$(MEASURE) equal
	$(MEASURE) throughput $(RECORDS)
	$(MEASURE) memory $(RECORDS)
	$(MEASURE) flat
	$(MEASURE) report

bench-quality: $(VENV)/.installed-bench
	$(MEASURE) quality
	$(MEASURE) report

soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m slow
	OMP_NUM_THREADS=1 $(BIN)/python experiments/reliability/measure.py soak

image-check: $(VENV)/.installed
	$(BIN)/python -m tests.image_check

stack-check: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stack
