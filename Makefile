# Every command of the project. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

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

.PHONY: lint
lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: test
test: lint ## lint, then every test that needs no GPU
	@$(BIN)/python -m pytest -q -m 'not soak'

.PHONY: soak
soak: $(STAMP) ## the long fault tests: a thousand storage faults
	@$(BIN)/python -m pytest -q -m soak

.PHONY: clean
clean: ## remove what run-local made
	rm -rf work
