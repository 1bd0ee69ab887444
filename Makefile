# Every command of the project. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests at once: one more than there are cores, for some wait; of memory each takes about 1 GB
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); test $$n -le 8 || n=8; echo $$((n + 1)))
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

# A name on the command line that no command reads is refused, before anything is set up or sent
GIVEN := $(strip $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v)))
ifneq ($(GIVEN),)
CHECKING := PYTHONPATH=trainer_image:. $(firstword $(wildcard $(BIN)/python) $(PYTHON))
WRONG := $(shell $(CHECKING) -m pipelines.make_variables '$(MAKECMDGOALS)' '$(GIVEN)')
ifneq ($(WRONG),)
$(error $(WRONG))
endif
endif

# What is given on the command line reaches the commands as environment: make submit-pipeline PROJECT=…
export

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV), once: some GB to download, so some minutes; nothing outside it is changed"
	@test -d $(VENV) || { echo "1/2 a virtual environment of $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "2/2 the packages of pyproject.toml in the versions of constraints.txt: torch, transformers, kfp, Google's clients"
	@started=$$(date +%s); if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
		$(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[cloud,pipelines,dev]' \
		&& echo "set up in $$(($$(date +%s) - started)) s"
	@touch $@

.PHONY: setup
setup: $(STAMP) ## create the virtual environment with everything the commands need

.PHONY: run-local
run-local: $(STAMP) ## the whole pipeline at a small scale on embedded text: no cloud, hub or GPU
	@$(BIN)/python -m pipelines.local

.PHONY: search
search: $(STAMP) ## short trainings ranked: GRID=examples/search.yaml [BACKEND=vertex or kfp PARAMS= WAIT=1 DRY_RUN=1]
	@$(BIN)/python -m pipelines.search $(BACKEND)

.PHONY: compile
compile: $(STAMP) ## compile the pipeline to build/pipeline.yaml (BACKEND=vertex or kfp)
	@$(BIN)/python -m pipelines.compile build/pipeline.yaml $(BACKEND)

.PHONY: build-image
build-image: $(STAMP) ## build and push TRAINER_IMAGE: with Cloud Build, or BUILDER=docker [DRY_RUN=1]
	@$(BIN)/python -m pipelines.build_image

.PHONY: preflight
preflight: $(STAMP) ## look whether Vertex AI would run it: what submit-pipeline takes; it looks first too
	@$(BIN)/python -m pipelines.preflight

.PHONY: estimate
estimate: $(STAMP) ## tokens, time and price of each stage, before a run [PARAMS= PRICES= BACKEND=kfp JSON=1]
	@$(BIN)/python -m pipelines.estimate $(BACKEND)

.PHONY: submit-pipeline
submit-pipeline: $(STAMP) ## submit to Vertex AI: PROJECT= PIPELINE_ROOT= TRAINER_IMAGE= [PARAMS= WAIT=1 DRY_RUN=1 PREFLIGHT=0]
	@$(BIN)/python -m pipelines.submit vertex

.PHONY: schedule
schedule: $(STAMP) ## let the platform submit it again and again: what submit-pipeline takes, or with HOST= submit-kfp; CRON="0 3 * * 1" [DRY_RUN=1]
	@$(BIN)/python -m pipelines.schedule

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
test: lint ## lint, then the tests that need no GPU, but for soak (JOBS=3 at a time)
	@$(BIN)/python -m pytest -q -m 'not soak' -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: soak
soak: $(STAMP) ## the long fault tests: kills, storage faults, races, stops, fuzzers
	@$(BIN)/python -m pytest -q -m soak

.PHONY: image-test
image-test: $(STAMP) ## build the image, run every stage in it [FULL=1 SEARCH=1 ENGINE= BASE=]; see docs/image.md
	@PYTHONPATH=trainer_image:. $(BIN)/python -m tests.image

.PHONY: clean
clean: ## remove the runs of run-local and their cache; with ALL=1 its teacher and corpus too
ifeq ($(ALL),1)
	rm -rf work
else
	@test ! -d work || find work -mindepth 1 -maxdepth 1 ! -name 'teacher*' ! -name corpus -exec rm -rf {} +
endif
