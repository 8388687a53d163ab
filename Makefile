# From a fresh clone to the built book, with python3 (3.10 or later) and make. `make help` says how.
PYTHON ?= python3
VENV   ?= .venv
PRESET ?= laptop
CONFIG ?= experiments/full-scale.yaml
JOBS   ?= 2

BIN   := $(VENV)/bin
BOOK  := $(BIN)/python -m tools.book
READY := $(VENV)/.ready
ALL   := '.[book,report,batch,transformers,test]'
QUIET := OMP_NUM_THREADS=1 TQDM_DISABLE=1
LIMIT := 1800
# A file stays with one process. Chapters first, and in the order of their names: no long one is last.
SPREAD = -n $(JOBS) --dist loadfile --no-loadscope-reorder
NBVAL  = --nbval-lax --nbval-current-env --nbval-cell-timeout=$(LIMIT)
QUICK := $(addprefix tests/test_, project.py dependencies.py packaging.py permutations.py curves.py)

.DEFAULT_GOAL := help
.PHONY: help setup book html notebooks figures check test smoke portable kills sound zoo clean

help:  ## say what the targets do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1|/' | column -t -s '|'

setup: $(READY)  ## make .venv with everything in it

book: setup  ## run the chapters (what is cached is not run), build the pages
	$(BOOK) book --preset $(PRESET) --jobs $(JOBS)

html: setup  ## build the pages from the stored outputs, run nothing
	$(BOOK) html

notebooks: setup  ## run the chapters, store their outputs in book/*.ipynb
	$(BOOK) notebooks --jobs $(JOBS)

figures: setup  ## full scale: all that CONFIG names, or one PRESET; resumable
	$(BIN)/python -m tools.batch run --config $(CONFIG) $(if $(filter command,$(firstword $(origin PRESET))),--set 'presets=[$(PRESET)]')

check: setup  ## in seconds: form, types, quick tests (`make test` runs all)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(QUIET) $(BIN)/pytest -m 'not slow' $(QUICK)

test: setup  ## everything that must pass
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(QUIET) MCNOTES_CELL_TIMEOUT=$(LIMIT) $(BIN)/pytest $(SPREAD) $(NBVAL) book tests

smoke: setup  ## run the chapters at the smallest preset
	$(QUIET) MCNOTES_CELL_TIMEOUT=$(LIMIT) $(BOOK) run --preset smoke --jobs $(JOBS)

portable: setup  ## the tests as on other processors (SETTINGS='avx2-1 default-2': only these)
	$(BIN)/python -m tools.portable $(if $(SETTINGS),--settings $(SETTINGS))

kills: setup  ## kill a whole batch at 50 random moments, and compare its numbers (half an hour)
	$(BIN)/python -m tools.kills

sound: setup  ## try PyTorch's operators and an hour of random programs: is what is found right?
	$(BIN)/python -m tools.programs

zoo: setup  ## compute all of data/zoo again, by running the chapters
	rm -f data/zoo/*.safetensors data/zoo/*.json
	MCNOTES_STORE=$(CURDIR)/data/zoo $(BOOK) run --force --jobs $(JOBS)

clean:  ## remove what was built, keep .venv and data
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	@echo 'Setting up $(VENV); most of it is PyTorch, 5 GB'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e $(ALL) || $(BIN)/pip install -e $(ALL)
	@$(BOOK) katex
	@touch $@
