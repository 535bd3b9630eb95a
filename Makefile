# Two commands matter: `make sft` fine-tunes a MoE model and shows the result, `make test` checks everything.
# Each does all the set-up it needs, once, in .venv. Runs with GNU make 3.81 or newer and bash.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
PARAMS ?=
NB ?= $(sort $(wildcard notebooks/*.ipynb))

# The repository may lie under a path with spaces: paths here are relative, and Python's tools run as `python -m`, since the
# first line of a script in .venv/bin, `#!/path/to/python`, cannot hold a space.
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)

# What makes a notebook print the same thing twice: no progress bars, one order of sets, figures as outputs. And OpenMP
# threads that wait sleep: on a shared machine spinning ones make small steps ten times slower.
QUIET := OMP_WAIT_POLICY=passive TQDM_DISABLE=1 PYTHONHASHSEED=0 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
unexport MPLBACKEND

# Jupyter and IPython keep files in the home folder, and do not start where they cannot.
ifneq ($(shell [ -w "$$HOME" ] && echo writable),writable)
export JUPYTER_CONFIG_DIR := $(CURDIR)/.venv/jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.venv/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR := $(CURDIR)/.venv/jupyter/ipython
endif

# `$(timed) command arguments` shows the command, runs it, and says how long it took and whether it failed.
timed = @timed() { printf '\n>>> %s\n' "$$*"; local start=$$SECONDS code=0; env $(QUIET) "$$@" || code=$$?; \
	printf '<<< %s: %s in %d s\n' "$$*" "$$([ $$code = 0 ] && echo ok || echo "FAILED ($$code)")" $$((SECONDS - start)); \
	return $$code; }; timed

.PHONY: help setup sft test test-gpu test-oldest test-notebooks test-peers compatibility sanitize lint format lab refs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

sft: setup ## fine-tune the built-in model in the SFT notebook; PARAMS=file.yaml for your own model and data
	@$(PY) -m ktlib.cli sft $(if $(PARAMS),"$(PARAMS)")

test: setup ## ruff, pytest, notebook structure, and every notebook re-run and compared with its stored outputs
	$(timed) $(PY) -m ruff check .
	$(timed) $(PY) -m ruff format --check .
	$(timed) $(PY) -m pytest tests
	$(timed) $(PY) -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
		--nbval-cell-timeout 900 --durations 10 notebooks

# For machines with a GPU or AMX, which may have Python packages of their own and no network: no .venv, nothing downloaded.
test-gpu: ## build for $(PYTHON) as it is, then the tests that need a GPU, and the kernels on this processor
	$(timed) "$(PYTHON)" -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(timed) "$(PYTHON)" -m pytest tests/gpu tests/csrc/test_kernels.py

# An environment of its own beside .venv: the list of environment.yml with tests/oldest.txt in place of the newest pins.
# (torch of that age comes from PyPI with its GPU libraries, several gigabytes.)
OLDEST := .venv-oldest/bin/python
test-oldest: .venv-oldest/.ktlib ## pytest on the oldest torch, transformers, peft and accelerate that are supported
	$(timed) $(OLDEST) -m pytest tests

.venv-oldest/.packages: environment.yml tests/oldest.txt .venv/.python
	"$(PYTHON)" -m venv .venv-oldest
	sed -n 's/^      - //p' environment.yml | grep -v -E "^($$(sed -n 's/==.*//p' tests/oldest.txt | paste -s -d '|'))==" \
		> .venv-oldest/requirements.txt
	$(OLDEST) -m pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt -r tests/oldest.txt
	@touch $@

.venv-oldest/.ktlib: .venv-oldest/.packages $(SOURCES)
	$(OLDEST) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--config-settings=build-dir=build/oldest --editable .
	@touch $@

test-notebooks: setup ## every notebook with random valid parameters, an hour; goes on where it stopped
	$(timed) $(PY) tests/long/notebook_parameters.py

# What these tests need is downloaded once, into build/peers.
TRANSFORMERS ?=
test-peers: setup ## PEFT's and transformers' own tests with ktlib in place; TRANSFORMERS=its git checkout for more of them
	$(timed) $(PY) tests/peers/run.py $(if $(TRANSFORMERS),--transformers "$(TRANSFORMERS)")

compatibility: setup .venv-oldest/.ktlib ## rewrite the compatibility table from tests on newest and oldest
	$(timed) $(PY) -m pytest tests -m compatible --compatibility build/newest.json
	$(timed) $(OLDEST) -m pytest tests -m compatible --compatibility build/oldest.json
	$(PY) tests/support/compatibility.py build/newest.json build/oldest.json

# The compiler's sanitizer runtimes must be in the process before Python is. ThreadSanitizer looks at our code alone (the
# interpreter and torch are not built for it), and cannot map its shadow memory where addresses are randomised widely.
# Its tests are those in which several threads work; all of them would take five times as long. No sanitizer sees what
# tile instructions and masked vectors load and store: the last stage puts memory beside pages that may not be touched.
# It is compiled as for use, since what it finds may be the compiler's doing. After the tests of each stage random calls
# (tests/fuzz_long.py), for a bounded time.
COMMA := ,
CXX_LIB = $$("$${CXX:-g++}" -print-file-name=$(1))
FIXED_ADDRESSES = $$(setarch -R true 2> /dev/null && echo setarch -R)
EXTENSION = KTLIB_TEST_EXTENSION="$$(ls build/$(1)/_kernels*.so)"
ASAN = $(call EXTENSION,sanitize) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$(call CXX_LIB,libasan.so) $(call CXX_LIB,libubsan.so)"
TSAN = $(call EXTENSION,tsan) TSAN_OPTIONS=ignore_noninstrumented_modules=1 LD_PRELOAD="$(call CXX_LIB,libtsan.so)" \
	$(FIXED_ADDRESSES)
FORBIDDEN = $(call EXTENSION,pages) KTLIB_TEST_PAGES=1
sanitized = $(timed) $(PY) -m cmake -S . -B build/$(1) -G Ninja -DKTLIB_SANITIZE=$(2) -DCMAKE_BUILD_TYPE=$(or $(3),RelWithDebInfo) \
	-DPython_EXECUTABLE="$(CURDIR)/$(PY)" -DCMAKE_MAKE_PROGRAM="$(CURDIR)/.venv/bin/ninja"
OPERATOR_TESTS = $(addprefix tests/operator/, test_moe_experts.py test_weight.py test_ops.py test_dropout.py)
PIECES = $(addprefix tests/operator/test_streaming.py::, \
	test_copies test_copies_through_a_ring test_copies_end_with_what_is_raised_meanwhile test_masks_of_rows)
FUZZ = $(PY) tests/fuzz_long.py --calls 1000000 --seconds 25
sanitize: setup ## the operator's tests and random calls under ASan and UBSan, under TSan, and between forbidden pages
	$(call sanitized,sanitize,address$(COMMA)undefined)
	$(timed) $(PY) -m cmake --build build/sanitize
	$(timed) $(ASAN) $(PY) -m pytest tests/csrc/test_kernels.py tests/csrc/test_codes.py $(OPERATOR_TESTS) \
		$(PIECES)
	$(timed) $(ASAN) $(FUZZ)
	$(call sanitized,tsan,thread)
	$(timed) $(PY) -m cmake --build build/tsan
	$(timed) $(TSAN) $(PY) -m pytest $(OPERATOR_TESTS) $(PIECES) \
		-k "test_copies or test_masks_of_rows or test_ops or any_number_of_threads or expert_weights or routings or long_batches or threads_parts"
	$(timed) $(TSAN) $(FUZZ)
	$(call sanitized,pages,pages,Release)
	$(timed) $(PY) -m cmake --build build/pages
	$(timed) $(FORBIDDEN) $(PY) -m pytest tests/csrc/test_codes.py $(OPERATOR_TESTS)
	$(timed) $(FORBIDDEN) $(FUZZ)

lint: setup ## ruff only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup ## let ruff fix and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lab: setup ## start JupyterLab on the notebooks: opens a browser where there is a display, prints the URL anyway
	$(PY) -m jupyterlab notebooks

refs: setup ## re-run notebooks and store their outputs; NB=notebooks/01_environment.ipynb for one
	$(timed) $(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 \
		--ExecutePreprocessor.timeout=1200 --ExecutePreprocessor.record_timing=False $(NB)

clean: ## remove what set-up and compilation made; runs/ stays
	rm -rf .venv .venv-oldest build

# Set-up. Each step leaves a stamp in .venv and is redone only when what it was made from is newer:
# the environment, the packages of environment.yml's pip list, and our extension (recompiled incrementally).
setup: .venv/.ktlib

.venv/.python:
	@command -v "$(PYTHON)" > /dev/null || \
		{ echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$("$(PYTHON)" -V), ktlib needs 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
		{ echo "$(PYTHON) has no C headers: on Debian and Ubuntu, apt install python3-dev"; exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@

.venv/.packages: environment.yml .venv/.python
	sed -n 's/^      - //p' environment.yml > .venv/requirements.txt
	@echo "installing the packages of environment.yml, once; some minutes on a new machine"
	$(PY) -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@touch $@

.venv/.ktlib: .venv/.packages $(SOURCES)
	@command -v "$${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null || \
		{ echo "no C++ compiler: on Debian and Ubuntu, apt install g++"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	@touch $@
