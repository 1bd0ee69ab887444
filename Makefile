# Every command of the project. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

# What is given on the command line reaches the commands as environment: make submit-pipeline NAME=…
export

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cloud,pipelines,dev]'
	@touch $@

.PHONY: setup
setup: $(STAMP) ## create the virtual environment with everything the commands need

.PHONY: run-local
run-local: $(STAMP) ## the whole pipeline at a small scale on embedded text: no cloud, hub or GPU
	@$(BIN)/python -m pipelines.local

.PHONY: compile
compile: $(STAMP) ## compile the pipeline to build/pipeline.yaml (BACKEND=vertex or kfp)
	@$(BIN)/python -m pipelines.compile build/pipeline.yaml $(BACKEND)

.PHONY: build-image
build-image: $(STAMP) ## build and push TRAINER_IMAGE: with Cloud Build, or BUILDER=docker [DRY_RUN=1]
	@$(BIN)/python -m pipelines.build_image

.PHONY: estimate
estimate: $(STAMP) ## tokens, time and price of each stage, before a run [PARAMS= PRICES= BACKEND=kfp JSON=1]
	@$(BIN)/python -m pipelines.estimate $(BACKEND)

.PHONY: submit-pipeline
submit-pipeline: $(STAMP) ## submit to Vertex AI: PROJECT= PIPELINE_ROOT= TRAINER_IMAGE= [PARAMS= WAIT=1 DRY_RUN=1]
	@$(BIN)/python -m pipelines.submit vertex

.PHONY: submit-kfp
submit-kfp: $(STAMP) ## submit to open-source Kubeflow Pipelines: HOST= TRAINER_IMAGE= [PARAMS= WAIT=1]
	@$(BIN)/python -m pipelines.submit kfp

.PHONY: rerun
rerun: $(STAMP) ## repeat one stage of a Vertex AI run and what follows: RUN= STAGE=continue [PARAMS= WAIT=1 DRY_RUN=1]
	@$(BIN)/python -m pipelines.rerun

.PHONY: bench-gpu
bench-gpu: $(STAMP) ## the training step beside its peers, on one GPU
	@$(BIN)/python -m pip install --quiet -e '.[bench]'
	@PYTHONPATH=trainer_image $(BIN)/python bench/gpu_step.py --contexts 512 1024

.PHONY: lint
lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: test
test: lint ## lint, then the tests that need no GPU, but for soak (JOBS=2 at a time)
	@$(BIN)/python -m pytest -q -m 'not soak' -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: soak
soak: $(STAMP) ## the long fault tests: kills, storage faults, races, stops, fuzzers
	@$(BIN)/python -m pytest -q -m soak

.PHONY: clean
clean: ## remove what run-local made
	rm -rf work
