# Two commands on a fresh machine (Python >= 3.11, a C++ compiler, make):
#   make demo    restores a noisy photograph, writes before/after pictures into demo/, prints PSNR, time and backend
#   make test    style checks and the test suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# What the native module is built from: a change here builds it again.
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench clean

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel cmake ninja pybind11
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[test,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/memnet demo -o demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Times every backend against its peers and appends to benchmarks/results/; needs a quiet machine.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]" --no-build-isolation
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build demo memnet_fast/_native*.so memnet_fast/_build_info.json
