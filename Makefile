# make demo   facts found in a long text, and measured  make lint    style, types, import contracts
# make test   the tests                                 make clean   remove everything built here
# make sanitize   the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
#
# Each creates .venv on its first run and reinstalls tamis when its sources have changed.
# Another interpreter: make demo PYTHON=python3.12
# Tests of the adapter to lm-eval, which brings 600 MB along: make test EXTRAS=dev,eval

PYTHON ?= python3
EXTRAS ?= dev
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

SOURCES := pyproject.toml $(wildcard CMakeLists.txt) \
           $(shell find src native $(wildcard models) -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test lint sanitize clean

demo: $(VENV)/package.stamp
	$(BIN)/tamis demo

test: $(VENV)/$(EXTRAS).stamp
	$(BIN)/pytest

lint: $(VENV)/$(EXTRAS).stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Python itself is not instrumented, hence the preloaded runtimes; it leaks on purpose.
SANITIZED := build/sanitize
sanitize: $(VENV)/$(EXTRAS).stamp
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DTAMIS_SANITIZE=ON \
	  -DTAMIS_EMULATE_AMX=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/site && mkdir -p $(SANITIZED)/site && cp -r src/tamis $(SANITIZED)/site/
	rm -f $(SANITIZED)/site/tamis/*.so
	$(BIN)/cmake --install $(SANITIZED) --prefix $(SANITIZED)/site
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/site \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/attention tests/cache/test_moves.py \
	    $(addprefix tests/model/,test_linear.py test_linear_int8.py test_norm.py test_fused.py test_rotate.py)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The build tools live in .venv too (hence --no-build-isolation), so CMake's build directory stays
# valid from one install to the next and only what changed is compiled again.
INSTALL = @echo "installing tamis into $(VENV) (the first time takes minutes: torch is large)"; \
          $(PIP) install --no-build-isolation --constraint constraints.txt

$(VENV)/package.stamp: $(VENV)/tools.stamp $(SOURCES)
	$(INSTALL) '.[bench]'
	@touch $@

$(VENV)/$(EXTRAS).stamp: $(VENV)/tools.stamp $(SOURCES)
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $(VENV)/package.stamp $@

$(VENV)/tools.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: tamis needs Python 3.11 or newer, and '$(PYTHON)' is" \
	       "$$($(PYTHON) --version 2>/dev/null || echo 'not to be found');" \
	       "name one that is: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@
