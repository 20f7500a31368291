# Every target sets up .venv by itself; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python on the path that the project supports.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	"$$p" -c "$(SUPPORTED)" 2>/dev/null && echo "$$p" && break; done)
EXTRAS ?= dev

# Arguments for pytest, e.g. make pytest ARGS="tests/core -x"
ARGS ?=
# Folder of test data that is not in the repository, and of the golden data in it.
FLEXSELECT_SHARED ?= ../shared
FIXTURES ?= $(FLEXSELECT_SHARED)/fixtures

# Model family of the commands that need one: qwen, llava, internvl, or a folder's name.
MODEL ?= qwen
# $(call option,name,VARIABLE): --name with the variable's value, where it has one.
option = $(if $($(2)),--$(1) '$($(2))')

# The folder of the family that MODEL may name for short.
FOLDER_qwen := qwen2_5_vl
FOLDER_llava := llava_video
FAMILY = $(or $(FOLDER_$(or $(MODEL),qwen)),$(MODEL))

# Passive waiting: threads that spin on busy cores cost more than they gain.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export FLEXSELECT_SHARED

.PHONY: help install test lint pytest format fixtures eval recall train-selector docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with the pinned versions (costs nothing when up to date)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.10, 3.11 or 3.12 with venv found; install one or name it: make install PYTHON=..." >&2; \
		exit 1; fi
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned versions into $(VENV): several GB, some minutes the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]"
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/flexselect
	@touch $@

# Both halves run whatever the other says, and either one fails the whole.
test: install ## lint, then all tests: what CI runs
	@lint=0; $(MAKE) --no-print-directory lint || lint=$$?; \
	$(MAKE) --no-print-directory pytest && \
	{ [ $$lint = 0 ] || echo "The tests passed, lint did not: see above." >&2; exit $$lint; }

lint: install ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy | sed 's|^$(VENV)/src/flexselect/||'

pytest: install ## the tests alone; choose some with ARGS="tests/core -x"
	$(BIN)/pytest -q $(ARGS)

format: install ## rewrite the code to the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fixtures: install ## compare with the golden data in FIXTURES=folder
	@if [ ! -d "$(FIXTURES)" ]; then \
		echo "No golden data at $(FIXTURES); name its folder: make fixtures FIXTURES=..." >&2; exit 1; fi
	$(BIN)/python scripts/check_fixture.py "$(FIXTURES)"

eval: install ## compare methods on benchmarks; MODEL= CKPT= TASKS= METHODS= SELECTOR= LIMIT= GPUS= REPORTS=1
	$(BIN)/flexselect eval $(strip $(MODEL) $(call option,ckpt,CKPT) $(call option,tasks,TASKS) \
		$(call option,methods,METHODS) $(call option,selector,SELECTOR) \
		$(call option,budget,BUDGET) $(call option,layer,LAYER) $(call option,frames,FRAMES) \
		$(call option,fps,FPS) $(call option,gpus,GPUS) $(call option,limit,LIMIT) \
		$(call option,include,INCLUDE) $(ARGS))
	$(if $(REPORTS),$(BIN)/flexselect reports 'results/eval/$(FAMILY)/latest')

recall: install ## which layer to read: recall@K of each; MODEL= CKPT= VIDEOS= NEEDLES= COUNT= OUT=
	$(BIN)/flexselect recall $(strip \
		$(if $(CKPT),$(call option,model,CKPT),$(call option,family,MODEL)) \
		$(call option,videos,VIDEOS) $(call option,needles,NEEDLES) $(call option,count,COUNT) \
		$(call option,frames,FRAMES) $(call option,seed,SEED) $(call option,budget,BUDGET) \
		$(call option,selector,SELECTOR) $(ARGS) \
		--out '$(or $(OUT),build/recall/$(notdir $(or $(CKPT),$(MODEL),qwen)))')

# More than one GPU: one process each, as CONFIG says (shared_configs/accelerate).
train-selector: install ## train a Lite selector; MODEL= CKPT= DATA= VIDEOS= STUDENT= LAYER= LR= EPOCHS= GPUS= OUT=
	$(if $(filter-out 1,$(if $(findstring --dry-run,$(ARGS)),,$(GPUS))),$(BIN)/accelerate launch \
		--config_file '$(or $(CONFIG),shared_configs/accelerate/ddp.yaml)' \
		--num_processes $(GPUS)) $(BIN)/flexselect train-selector $(strip $(MODEL) \
		$(call option,ckpt,CKPT) $(call option,data,DATA) $(call option,videos,VIDEOS) \
		$(call option,scores,SCORES) $(call option,student,STUDENT) \
		$(call option,layer,LAYER) $(call option,aggregation,AGGREGATION) $(call option,lr,LR) \
		$(call option,epochs,EPOCHS) $(call option,out,OUT) \
		$(if $(findstring --dry-run,$(ARGS)),$(call option,gpus,GPUS)) $(ARGS))

docs: install ## build the documentation into build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

# Also when the first half ends badly: the parts do not depend on it.
bench: install ## time and memory by stage, then by part; MODEL= SHAPE=tiny|small|7b FRAMES= OUT=
	@stages=0; \
	$(BIN)/python scripts/bench.py --threads $(OMP_NUM_THREADS) $(strip \
		$(call option,model,MODEL) $(call option,shape,SHAPE) $(if $(FRAMES),--frames $(FRAMES)) \
		$(call option,out,OUT) $(ARGS)) || stages=$$?; \
	$(BIN)/python scripts/bench.py $(strip --micro --threads $(OMP_NUM_THREADS) \
		$(call option,out,OUT) $(filter --check,$(ARGS))) && exit $$stages

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
