# A fresh machine needs Python >= 3.10 and make; everything else goes to .venv, which is re-used while it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DIGITS := $(BIN)/python examples/digits.py

# xdist starts two workers: more threads than one in each only get in each other's way
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n 2
COVERAGE := --cov --cov-report=term

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full bench lint types layers unit tables zoo format clean distclean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.examples ## digits in float, in int16 without training, in int8 with QAT: about a minute
	$(DIGITS) fit --config configs/digits_float.yaml
	$(DIGITS) test --config configs/digits_int16.yaml
	$(DIGITS) fit --config configs/digits_int8.yaml
	$(DIGITS) test --config configs/digits_int8.yaml --ckpt_path logs/digits/int8/int8.ckpt
	$(BIN)/python -m lightning_qat report $$(dirname $$(ls -t logs/digits/runs/int8/*/lightning_qat/quant_plan.json | head -1))

test: lint types layers unit ## everything a change must pass

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy --strict

layers: $(VENV)/.dev ## the import direction and the size of the files
	$(BIN)/python -m pytest -q tests/test_layers.py

unit: $(VENV)/.dev ## tests and doctests, with coverage
	$(PYTEST) $(COVERAGE) --doctest-modules lightning_qat tests

test-full: $(VENV)/.dev ## the same with the long suites
	$(PYTEST) $(COVERAGE) --doctest-modules -m "full or not full" --hypothesis-profile default --timeout 3600 lightning_qat tests

bench: $(VENV)/.dev ## measure training steps and insertion time
	$(BIN)/python tests/benchmarks/run.py

tables: $(VENV)/.dev ## write the table of torch functions into the docs
	$(BIN)/python -m tests.quantization.functions.document

zoo: $(VENV)/.dev ## quantize the models of tests/zoo and write the tables
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.mixed_precision
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.onnx_export
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.tuning

format: $(VENV)/.dev ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what runs and tools wrote; the environment stays
	rm -rf logs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist
	find lightning_qat tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# One stamp for each set of extras. Torch comes first, alone and pinned, so that nothing else chooses its build.
$(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e '.[$*]'
	@touch $@
