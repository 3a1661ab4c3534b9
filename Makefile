# Two commands for a fresh machine with python3.11+, make and a package registry: `make demo` and `make test`.
# Everything lives in .venv; stamps make a second call start at once.

PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.maodun-installed
TORCH   ?= torch==2.13.0

# One thread per process: small networks on few cores lose more to thread hand-over than they gain.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test lint bench clean
help:
	@echo "make demo | test | lint | bench | install | clean"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: python: no python3.11 or newer found; install one, or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing later chooses another build of it. A Linux machine without a GPU may prefer
# the smaller CPU build: PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> make install TORCH=torch==2.13.0+cpu
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,data,report,train]'
	@touch $@

install: $(STAMP)

# The same line again resumes, so a demo that was interrupted goes on where it stopped.
demo: $(STAMP)
	$(BIN)/maodun arena recipes/demo.yaml --out runs/demo
	$(BIN)/maodun report runs/demo --out runs/demo/report.html

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal --durations 15

# The peers live in an environment of their own; nothing of it touches .venv.
bench: | $(BIN)/python
	PYTHON=$(BIN)/python benchmarks/setup.sh
	.venv-bench/bin/python -m benchmarks.speed
	.venv-bench/bin/python -m benchmarks.strength

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
