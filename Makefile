# make train    train the reference model twice (plain DDP, then compressed) and compare
# make test     the test suite
# make check    linters and types, and that the documentation builds and the CUDA kernels compile
# make docs     the documentation, into site/
# make bench    the benchmarks, as ratios within one run
# make asan     the kernels' tests under the address and undefined-behaviour sanitizers
# make venv     .venv with everything the above need

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: venv train test check docs bench asan format clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: venv
	$(PY) launch/quickstart.py $(ARGS)

test: venv
	$(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

check: venv docs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	@if command -v clang-format >/dev/null && ls csrc/*.cpp >/dev/null 2>&1; then \
	    clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'tests/ops/cuda_emulation/*'); fi
	@if [ -x "$$CUDA_HOME/bin/nvcc" ] || command -v nvcc >/dev/null; then \
	    echo "compiling the CUDA kernels" && $(PY) csrc/cuda/compile.py build/check/_kernels_cuda.so; \
	    else echo "no nvcc: whether the CUDA kernels compile was not checked"; fi

docs: venv
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PY) -m mkdocs build --strict --quiet $(ARGS)

bench: venv
	$(PY) benchmarks/run_all.py $(ARGS)

asan: venv
	rm -rf build/asan
	mkdir -p build/asan
	cp -r commkit tests pyproject.toml build/asan
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	    -fno-math-errno -fno-trapping-math -ffp-contract=off -fPIC -shared -pthread -ldl \
	    csrc/*.cpp -o build/asan/commkit/ops/_kernels.so
	cd build/asan && COMMKIT_NATIVE=1 ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(abspath $(PY)) -m pytest -q \
	    $(addprefix tests/ops/test_,native.py native_codebooks.py in_place.py sign_lists.py e3m0.py selection.py largest.py dgc_step.py tiles.py updates.py hostile_payloads.py) \
	    tests/contract/test_hostile_payloads.py $(ARGS)

format: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build site commkit/ops/_kernels*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
