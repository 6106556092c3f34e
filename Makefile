# Two commands on a fresh machine (Python >= 3.11, a C++ compiler, make):
#   make demo    restores a noisy photograph, writes before/after pictures into demo/, prints PSNR, time and backend
#   make test    style checks and the test suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# What the native module is built from: a change here builds it again.
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench fuzz clean

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel cmake ninja pybind11
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[test,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/memnet demo -o demo

# One process for each CPU, which then computes alone: threads beside processes would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Times every backend against its peers and appends to benchmarks/results/; needs a quiet machine.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]" --no-build-isolation
	$(BIN)/python -m benchmarks.run

# Fuzzes every reader of weight files for a minute (make fuzz FUZZ_SECONDS=3600); what it finds stays in .fuzz/.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	for reader in $$(ls tests/fuzz/corpus); do mkdir -p .fuzz/$$reader && $(BIN)/python tests/fuzz/fuzz_weights.py $$reader .fuzz/$$reader \
	  tests/fuzz/corpus/$$reader -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=2048 -artifact_prefix=.fuzz/$$reader- || exit 1; done

clean:
	rm -rf $(VENV) build demo memnet_fast/_native*.so memnet_fast/_build_info.json
