# `make` alone says what there is. `demo` and `test` do all their own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
RUN ?= runs/demo
bin := $(VENV)/bin

.PHONY: help setup demo test check clean isaac test-isaac libero test-libero

help: ## what you can type
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(VENV)/ready ## environment, packages and an offscreen GL
	@bash scripts/offscreen_gl.sh $(bin)/python

$(VENV)/ready: pyproject.toml constraints.txt
	@bash scripts/environment.sh "$(PYTHON)" $(VENV)
	@touch $@

demo: setup ## train a small VLA in a closed loop, evaluate it, write a report (about 11 minutes on 2 cores)
	$(bin)/python main.py train hydra.run.dir=$(RUN) $(if $(wildcard $(RUN)/.hydra/overrides.yaml),resume=$(RUN))
	@echo "open $(RUN)/report.html"

test: setup ## every test
	$(bin)/python -m pytest -n 2 --dist loadgroup --capture=no

isaac: ## Isaac Lab's own environment, in your cache: 8 GB (ISAACLAB_PYTHON names an existing one)
	@PYTHON312=$(PYTHON312) bash scripts/isaac.sh

test-isaac: setup isaac ## the tests that need it
	$(bin)/python -m pytest -m isaac

libero: ## LIBERO's own environment, in your cache: 2 GB (LIBERO_PYTHON names an existing one)
	@PYTHON311=$(PYTHON311) bash scripts/libero.sh

test-libero: setup libero ## the tests that need it
	$(bin)/python -m pytest -m libero

check: setup ## ruff, types, import layers
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports

clean: ## remove the environment; runs stay
	rm -rf $(VENV)
