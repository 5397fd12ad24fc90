# make demo          train a small DDPM on handwritten digits, sample it, score the samples (runs/demo/)
# make test          lint, types and every test
# make test-nightly  every test as other CPUs run it, and the exhaustive ones, for hours (.ci/nightly)
# make bench         compare with other libraries (pytest-benchmark)
# make docs          all pages and the API reference (site/)
# make gpu           on a machine with an NVIDIA GPU: build, test and measure there in nine minutes
# Each but the last makes the virtual environment .venv and installs fastdiff there first, where that is still to do.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
NATIVE := $(wildcard csrc/*.cpp csrc/*/*)

# Without an NVIDIA driver: one pinned torch. With one: the newest. Override with TORCH=...
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version),torch,torch==2.13.0)

# The tests' real packages whose own needs (torchvision) would replace that torch by CUDA's.
WITHOUT_DEPENDENCIES := denoising-diffusion-pytorch einops

# How OpenMP's threads wait is chosen by fastdiff itself (fastdiff/wait_policy.py), in the tests too.
# For 8x8 images one thread is faster than two; the tests have a process to each core.
demo test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-nightly lint bench docs gpu clean

demo: $(VENV)/demo.installed
	$(BIN)/fastdiff train --preset digits --data digits --out $(DEMO) --resume
	$(BIN)/fastdiff sample --checkpoint $(DEMO) --out $(DEMO) --num 1000 --steps 50
	$(BIN)/fastdiff evaluate --samples $(DEMO)/samples_1000x8x8x1.npz --data digits --out $(DEMO)/evaluation.json
	@echo "Look at $(DEMO)/grid.png (the samples) and $(DEMO)/loss_curve.png."

# A process to each core, a file's tests in one of them.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25

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

# With that machine's own Python and packages: it needs no network.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

$(VENV)/%.installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE) | $(VENV)/torch.installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	$(if $(filter test,$*),$(BIN)/pip install --quiet --no-deps $(WITHOUT_DEPENDENCIES))
	@touch $@

$(VENV)/torch.installed:
	@test -n "$(PYTHON)" || { echo "fastdiff needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastdiff/*.so
