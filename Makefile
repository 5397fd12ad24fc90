# make demo          train a small DDPM on handwritten digits, sample it, score the samples (runs/demo/)
# make check         lint, types and of every test function a case, in two minutes: while you work
# make test          lint, types and the tests, in twelve minutes: before you push
# make test-all      the long tests too: sanitizers, broken kernels, every compilation, for hours
# make test-nightly  make test-all's as other CPUs run them, for many hours (.ci/nightly)
# make bench         compare with other libraries (pytest-benchmark)
# make docs          all pages and the API reference (site/)
# make gpu-first     on a machine with an NVIDIA GPU: what works, what breaks, where the time goes; five minutes
# make gpu-full      there too: against the compiled and the eager peers, and the tests; seven minutes
# make gpu-bundle    beforehand, elsewhere: the library and the wheels that they use (PYTHON=python3.12)
# Each but the gpu ones makes the virtual environment .venv and installs fastdiff there first, where that is still to do.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# DRY=1 runs the phases on the CPU, with tiny sizes; ONLY=smoke,sampler or FROM=profile some of them.
GPU_PYTHON ?= $(if $(DRY),$(BIN)/python,python3)
OUT ?= runs/gpu
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
NATIVE := $(wildcard csrc/*.cpp csrc/*/*)

# Without an NVIDIA driver: one pinned torch. With one: the newest. Override with TORCH=...
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version),torch,torch==2.13.0)

# The tests' real packages whose own needs (torchvision) would replace that torch by CUDA's.
WITHOUT_DEPENDENCIES := denoising-diffusion-pytorch einops
# And those that others import where they find them, for what is not there: in a folder of their own.
APART := torch-fidelity

# How OpenMP's threads wait is chosen by fastdiff itself (fastdiff/wait_policy.py), in the tests too.
# The demo's 8x8 images keep two threads busy, no more; the tests have a process to each core.
demo: export OMP_NUM_THREADS ?= 2
check test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: demo check test test-all test-nightly lint bench docs gpu-first gpu-full gpu-bundle clean

demo: $(VENV)/demo.installed
	@echo "== Training on 1,797 digits"
	$(BIN)/fastdiff train --preset digits --data digits --steps 1000 --lr 0.002 --out $(DEMO) --resume
	@echo "== Sampling 1,000 images"
	$(BIN)/fastdiff sample --checkpoint $(DEMO) --out $(DEMO) --num 1000 --batch-size 250 \
		--method sde-dpmsolver++ --steps 30
	@echo "== Scoring them"
	$(BIN)/fastdiff evaluate --samples $(DEMO)/samples_1000x8x8x1.npz --data digits --out $(DEMO)/evaluation.json
	@echo "Look at $(DEMO)/grid.png (the samples) and $(DEMO)/loss_curve.png."

# A process to each core and one more, a file's tests in one of them. pyproject.toml says which test
# is in which.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25

check: lint
	$(PYTEST) -q --quick

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) --all

test-nightly: lint
	PYTHON=$(BIN)/python .ci/nightly

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.installed
	$(BIN)/python -m pytest benchmarks -rs --benchmark-quiet --results

docs: $(VENV)/docs.installed
	$(BIN)/python -m mkdocs build --strict

# With that machine's own Python and packages: they need no network.
gpu-first gpu-full: $(if $(DRY),$(VENV)/test.installed)
	PYTHONPATH=benchmarks $(GPU_PYTHON) -m gpu.run $(@:gpu-%=%) --out $(OUT) \
		$(if $(ONLY),--only $(ONLY)) $(if $(FROM),--from $(FROM)) $(if $(DRY),--dry)

gpu-bundle: PYTHON = python3.12
gpu-bundle:
	@$(PYTHON) -c '' 2>/dev/null || { echo "make gpu-bundle: there is no $(PYTHON) here: name the GPU machine's version, PYTHON=/path/to/python3.12" >&2; exit 1; }
	PYTHONPATH=benchmarks $(PYTHON) -m gpu.bundle $(if $(CACHES),--caches $(CACHES))

# The build tools stand in the environment, so that what is compiled once stays compiled: make test
# after make demo compiles nothing, and after a change only what changed. Packages are fetched while
# the library compiles.
MAKEFLAGS += --jobs=2

# pip would compile every file of every package to bytecode, for half a minute: --no-compile. What is
# imported is compiled then, and kept.
unexport PYTHONDONTWRITEBYTECODE

$(VENV)/%.installed: pyproject.toml setup.py | $(VENV)/native.built $(VENV)/%.packages
	@echo "== Installing fastdiff with its extra '$*'"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --no-build-isolation --editable '.[$*]'
	$(if $(filter test,$*),$(BIN)/pip install --no-compile --no-deps $(WITHOUT_DEPENDENCIES))
	$(if $(filter test,$*),$(BIN)/pip install --no-compile --no-deps --upgrade --target $(VENV)/apart $(APART))
	@touch $@

$(VENV)/native.built: setup.py CMakeLists.txt $(NATIVE) | $(VENV)/tools.installed
	@echo "== Compiling the native library"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/%.packages: pyproject.toml | $(VENV)/tools.installed
	@echo "== Fetching $(TORCH) and the packages of the extra '$*'"
	$(BIN)/python .ci/requirements.py $* > $@.txt
	$(BIN)/pip install --no-compile '$(TORCH)' --requirement $@.txt
	@touch $@

$(VENV)/tools.installed:
	@test -n "$(PYTHON)" || { echo "fastdiff needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "== Making $(VENV) with the build tools"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python .ci/requirements.py > $(VENV)/build-tools.txt
	$(BIN)/pip install --requirement $(VENV)/build-tools.txt
	@touch $@

.PRECIOUS: $(VENV)/%.packages

clean:
	rm -rf $(VENV) build dist *.egg-info fastdiff/*.so
