# The front door. Every target sets up .venv first, from pinned versions; that is quick when it is there already.
PYTHON ?= python3
TARGET ?= cpu
BUDGET ?= 180
VENV   := .venv
RAMNET := $(VENV)/bin/ramnet

.DEFAULT_GOAL := help
.PHONY: help setup tune bench test lint train export demo clean

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# torch comes first and alone: it is the one package whose build (CPU or CUDA) the machine's pip settings choose.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[tvm,gpu,tune,export,dev]'
	touch $@

setup: $(VENV)/.installed  ## Build .venv

tune: setup  ## Tune the memory ops for TARGET (cpu) within BUDGET (180) seconds, then compare with eager
	$(RAMNET) tune --target $(TARGET) --budget $(BUDGET)

bench: setup  ## Measure every op and the model against eager, C++ and the bandwidth floor
	$(RAMNET) bench --target $(TARGET)

test: setup  ## Run the tests
	$(VENV)/bin/pytest

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

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
