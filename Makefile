# Everything sets itself up in .venv (or in VENV=...) and needs nothing but Python, make and a C++
# compiler on the way.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py pyproject.toml
CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')

.PHONY: demo test test-python test-cpp test-slow bench bench-gpu codegen docs lint format aarch64 \
  dist test-dist clean

demo: $(READY)
	$(BIN)/python examples/emoji/train.py

test: test-python test-cpp

test-python: $(READY)
	$(BIN)/pytest

# the long sweeps that `make test` leaves out
test-slow: $(READY)
	$(BIN)/pytest -m slow

# the C++ core alone: as it ships, then under sanitizers
test-cpp: $(READY)
	$(MAKE) ctest-release ctest-address,undefined ctest-thread

ctest-%:
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DMMFAST_PYTHON=OFF -DMMFAST_TESTS=ON -DMMFAST_SANITIZE=$(filter-out release,$*)
	$(BIN)/cmake --build build/$*
	$(BIN)/ctest --test-dir build/$* --output-on-failure

# times every case and its peers on this machine and writes bench/results and bench/RESULTS.md
bench: $(READY)
	$(BIN)/python -m bench all --peers
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.scaling

# checks and times the GPU kernels; needs a CUDA card
bench-gpu: $(READY)
	$(BIN)/python -m bench gpu --out bench/results

# compiles every GPU kernel for three architectures and writes bench/CODEGEN.md; needs no card
codegen: $(READY)
	$(BIN)/python -m bench.codegen

# renders docs/ into build/docs; a warning is an error
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# the generic level on another processor (needs g++-aarch64-linux-gnu; runs too if qemu-user is there)
aarch64: $(READY)
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DMMFAST_PYTHON=OFF -DMMFAST_TESTS=ON
	$(BIN)/cmake --build build/aarch64
	@if command -v qemu-aarch64-static >/dev/null; then \
	  for t in $$(find build/aarch64/tests/cpp -maxdepth 1 -name 'test_*' -type f -executable); do \
	    echo qemu: $$t; qemu-aarch64-static -L /usr/aarch64-linux-gnu $$t || exit 1; done; \
	else echo "compiled; not run: qemu-aarch64-static is not installed"; fi

# sdist, and from it a wheel whose OpenMP runtime stays torch's own
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/twine check --strict dist/*

# the wheel in an environment of its own, with nothing to compile by
test-dist: dist
	$(PYTHON) -m venv --clear build/installed
	build/installed/bin/pip install -q $$(grep '^torch==' requirements-dev.txt) dist/*.whl
	cd build/installed && PATH=$(abspath build/installed/bin) bin/python -I $(abspath tests/smoke.py)

$(READY): requirements-dev.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q -e .
	touch $(READY)

clean:
	rm -rf build dist *.egg-info mmfast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
