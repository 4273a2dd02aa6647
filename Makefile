# The front door. Every target sets up .venv first, from pinned versions; that is quick when it is there already.
# With RAMNET_PYTHON=python3, an interpreter that has the packages, nothing is installed and the checkout is run as it
# lies: for a machine with a GPU and without a network.
PYTHON ?= python3
TARGET ?= cpu
BUDGET ?= 180
JOBS   ?= auto
VENV   := .venv
ifdef RAMNET_PYTHON
READY  :=
RUN    := $(RAMNET_PYTHON)
else
READY  := $(VENV)/.installed
RUN    := $(VENV)/bin/python
endif
RAMNET := $(RUN) -m ramnet.cli

.DEFAULT_GOAL := help
.PHONY: help setup tune bench test test-gpu gpu lint train export demo clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# torch comes first and alone: it is the one package whose build (CPU or CUDA) the machine's pip settings choose.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[tvm,gpu,tune,export,dev]'
	touch $@

setup: $(READY)  ## Build .venv

tune: setup  ## Tune the memory ops for TARGET (cpu) within BUDGET (180) seconds
	$(RAMNET) tune --target $(TARGET) --budget $(BUDGET)

bench: setup  ## Measure every op and the model on TARGET against eager forms, other libraries and the floor
	$(RAMNET) bench --target $(TARGET)

# Tests side by side leave no core idle, so that threads which spin while they wait would only take time from others:
# 76 s instead of 132 for tests/ramnet and tests/export on two cores. A file's tests share what they compile.
test: setup  ## Run the tests, JOBS (auto: one a core) files at a time
	OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile

# What runs on a GPU where there is one. cuBLAS needs to be told to give the same bits every time.
GPU_TESTS ?= tests/lowering/gpu tests/lowering/test_gpu_model.py tests/lowering/test_graphs.py tests/gpu

test-gpu: setup  ## Run the tests that need a GPU, and the Triton kernels' on it rather than interpreted
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu needs a CUDA device, and torch sees none")'
	env -u TRITON_INTERPRET CUBLAS_WORKSPACE_CONFIG=:4096:8 $(RUN) -m pytest $(GPU_TESTS)

# Where there is a GPU, all that is to be known of it: are the kernels right, how fast are they, can they be faster.
gpu: test-gpu  ## On the GPU that TARGET names: test, bench, tune for BUDGET seconds, bench again; results in runs/gpu
	@test $(TARGET) != cpu || { echo "gpu needs TARGET=name, a GPU of 'ramnet targets'"; exit 1; }
	$(RAMNET) bench --target $(TARGET) --output runs/gpu/before
	$(RAMNET) tune --target $(TARGET) --budget $(BUDGET) --output runs/gpu/tune
	$(RAMNET) bench --target $(TARGET) --output runs/gpu/after

lint: setup  ## ruff, mypy and the directions of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache

CHECKPOINT ?= runs/text

train: setup  ## Train a small byte-level language model for a few minutes, into CHECKPOINT
	$(RAMNET) train text --output $(CHECKPOINT)

export: setup  ## Export CHECKPOINT to ONNX and verify it
	$(RAMNET) export $(CHECKPOINT) --output $(CHECKPOINT)/onnx

demo: setup  ## Train, tune, bench, export and generate, in under ten minutes on two cores
	$(RAMNET) train text --output runs/demo --seconds 90
	$(RAMNET) tune --budget 60
	$(RAMNET) bench --quick
	$(RAMNET) export runs/demo --output runs/demo/onnx
	$(RAMNET) generate --onnx runs/demo/onnx "def forward(self, x):" --max-new-tokens 200

clean:  ## Remove .venv and what runs wrote
	rm -rf $(VENV) runs build
