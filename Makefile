# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
# EXTRAS=bench,data adds extras of pyproject.toml (tpu: libtpu, to compile for TPUs without one); PYTHON= chooses the interpreter.
PYTHON ?= python3
EXTRAS ?=
VENV ?= .venv
BIN := $(VENV)/bin
COMMA := ,
WANTED := dev$(if $(EXTRAS),$(COMMA)$(EXTRAS))
STAMP := $(VENV)/.installed-$(WANTED)

.PHONY: env quickstart test test-slow lint bench pods clean

env: $(STAMP)

# uv where it is installed, otherwise venv and pip.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  [ -x $(BIN)/python ] || uv venv --python $(PYTHON) $(VENV); \
	  uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[$(WANTED)]'; \
	else \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(WANTED)]'; \
	fi
	@touch $@

quickstart: env
	$(BIN)/loam run --config=configs/quickstart.py
	$(BIN)/loam run --config=configs/sft_quickstart.py
	$(BIN)/loam run --config=configs/grpo_quickstart.py

test: env
	$(BIN)/python -m pytest
	LOAM_TEST_OPTIMISED=1 $(BIN)/python -m pytest -m 'optimised and not slow'

test-slow: env
	LOAM_TEST_OPTIMISED=1 $(BIN)/python -m pytest -m slow -n 0
	LOAM_TEST_OPTIMISED=1 bash tests/other_pythons.sh

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench:
	$(MAKE) env EXTRAS=bench
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/loam models | grep -q smollm2-135m-instruct || $(BIN)/loam pull smollm2-135m-instruct
	$(BIN)/python benchmarks/grpo_step.py

pods:
	$(MAKE) env EXTRAS=tpu
	$(BIN)/python -m experiments.pods

clean:
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache
