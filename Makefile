# Every target first creates .venv with pinned versions, unless it exists. RAMNET_PYTHON=python3 uses that interpreter,
# which must have the packages, and installs nothing: for a machine with a GPU and without a network.
PYTHON ?= python3
TARGET ?= cpu
BUDGET ?= 180
FORMAT ?= c
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
.PHONY: help setup tune bench test fuzz test-gpu gpu gpu-kit lint train mqar lm export demo clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# torch is installed first and by itself, because the machine's pip settings choose its build (CPU or CUDA).
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[tvm,gpu,tune,export,text,hf,dev]'
	touch $@

setup: $(READY)  ## Build .venv

ifndef CHECKPOINT
TUNE := tune --target $(TARGET)
else ifeq ($(TARGET), cpu)
TUNE := tune-model "$(CHECKPOINT)" --format $(FORMAT)
else
TUNE := tune --target $(TARGET) --checkpoint "$(CHECKPOINT)"
endif

tune: setup  ## Tune the memory ops for TARGET (cpu) in BUDGET (180) seconds; with CHECKPOINT=…, for its sizes or, on the CPU, its deployment in FORMAT (c, onnx)
	$(RAMNET) $(TUNE) --budget $(BUDGET)

bench: setup  ## Compare every op and the model on TARGET with eager PyTorch, other libraries and the bandwidth bound
	$(RAMNET) bench --target $(TARGET)

# Parallel tests use all cores, so each has one thread, and threads that a test adds sleep while they wait: on two cores,
# passive waiting reduces the time of tests/ramnet and tests/export from 132 s to 76 s, and one thread instead of two the
# time of tests that trace models to 0.84 of it. Tests of one file share what they compile.
test: setup  ## Run the tests, JOBS (auto: one per core) files at a time
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile

SECONDS_OF_FUZZING ?= 60

fuzz: setup  ## Read damaged files with the C library under sanitizers for SECONDS_OF_FUZZING (60)
	$(RUN) -m tests.robustness.c_files $(SECONDS_OF_FUZZING)

# The tests that use a GPU if there is one. CUBLAS_WORKSPACE_CONFIG makes cuBLAS deterministic.
GPU_TESTS ?= tests/lowering/gpu tests/lowering/test_gpu_model.py tests/lowering/test_graphs.py tests/gpu

test-gpu: setup  ## Run the tests that need a GPU, and those of the Triton kernels without the interpreter
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu needs a CUDA device, and torch sees none")'
	env -u TRITON_INTERPRET CUBLAS_WORKSPACE_CONFIG=:4096:8 $(RUN) -m pytest $(GPU_TESTS)

gpu:  ## On the GPU TARGET: test, bench, tune for BUDGET seconds, bench again; results in runs/gpu
	@test $(TARGET) != cpu || { echo "gpu needs TARGET=name, a GPU of 'ramnet targets'"; exit 1; }
	$(MAKE) test-gpu
	$(RAMNET) bench --target $(TARGET) --output runs/gpu/before
	$(RAMNET) tune --target $(TARGET) --budget $(BUDGET) --output runs/gpu/tune
	$(RAMNET) bench --target $(TARGET) --output runs/gpu/after

gpu-kit: setup  ## Fill build/gpu-kit with what a machine with a GPU and without a network lacks
	$(RUN) -m autotune.bench.gpu.kit

lint: setup  ## Run ruff, mypy and import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache

CHECKPOINT ?= runs/text

train: setup  ## Train a small byte-level language model for a few minutes and write it to CHECKPOINT
	$(RAMNET) train text --output "$(CHECKPOINT)"

SCALE ?= quick

mqar: setup  ## Compare recall with other mixers at SCALE (quick, day, paper, ablations); what is done in runs/recall is not repeated
	$(RAMNET) recall --scale $(SCALE)

lm: setup  ## Compare language models at SCALE (quick, night); what is done in runs/lm is not repeated
	$(RAMNET) lm --scale $(SCALE)

export: setup  ## Export CHECKPOINT to ONNX and verify it
	$(RAMNET) export "$(CHECKPOINT)" --output "$(CHECKPOINT)/onnx"

demo: setup  ## Train, tune, bench, export and generate, in under ten minutes on two cores
	$(RAMNET) train text --output runs/demo --seconds 90
	$(RAMNET) tune --budget 60
	$(RAMNET) bench --quick
	$(RAMNET) export runs/demo --output runs/demo/onnx
	$(RAMNET) generate --onnx runs/demo/onnx "def forward(self, x):" --max-new-tokens 200

clean:  ## Remove .venv, runs and build, which has the kit for a GPU
	rm -rf $(VENV) runs build
