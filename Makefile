# make train    train the reference model twice (plain DDP, then compressed) and compare
# make test     the test suite
# make check    linters and types
# make bench    the benchmarks, as ratios within one run
# make venv     .venv with everything the above need

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: venv train test check bench format clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: venv
	$(PY) launch/quickstart.py $(ARGS)

test: venv
	$(PY) -m pytest $(ARGS)

check: venv
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	@if command -v clang-format >/dev/null && ls csrc/*.cpp >/dev/null 2>&1; then \
	    clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu'); fi

bench: venv
	$(PY) benchmarks/run_all.py $(ARGS)

format: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
