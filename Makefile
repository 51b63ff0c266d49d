# Everything here works from a fresh clone: the first target that needs it makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEMO := $(VENV)/.installed-demo

# Tests and the demo need no Hub, and two workers share the cores better with one thread each.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help demo app install test style quality bench tiny
.DEFAULT_GOAL := help

help: ## Show these lines.
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: with it in place, no other package's open range asks for another build of it.
$(INSTALLED_DEMO): setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[serve]'
	touch $@

$(INSTALLED): $(INSTALLED_DEMO)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,train]'
	touch $@

# Cores that others use, too, are not waited for at full speed.
demo app: export OMP_WAIT_POLICY := PASSIVE

demo: $(INSTALLED_DEMO) ## Edit two small pictures with the embedded model and draw demo.png.
	$(BIN)/diffusers-dim demo --output demo.png

app: $(INSTALLED_DEMO) ## Edit pictures in the browser, at an address that it prints.
	$(BIN)/python examples/app.py

install: $(INSTALLED) ## Install all that training, evaluation and the tests need.

test: $(INSTALLED) ## Run the tests.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

style: $(INSTALLED) ## Format the code and mend what can be mended.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED) ## Check format, lint and the types of the public API.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED) ## Time this package against stock diffusers parts, and write the tables of README.md and docs/.
	$(BIN)/python benchmarks/bench.py call step growth --preset cpu
	$(BIN)/python benchmarks/bench.py edit approximate --preset embedded
	$(BIN)/python benchmarks/report.py

# Made aside; its stages, in .tiny_work, are kept, so that a stopped run goes on where it was.
tiny: $(INSTALLED) ## Make the embedded model anew from nothing.
	rm -rf .tiny_work/new_shapes
	$(BIN)/python examples/make_tiny_shapes.py --work_dir .tiny_work --output .tiny_work/new_shapes
	rm -rf src/diffusers_dim/tiny/shapes
	mv .tiny_work/new_shapes src/diffusers_dim/tiny/shapes
