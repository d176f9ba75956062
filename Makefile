# Everything runs in an environment of its own below $(VENV); `make setup` makes it once.
PYTHON ?= python3
VENV ?= .venv
OUT ?= outputs
DATA ?= $(NEMF_DATA)
WEIGHTS ?= $(NEMF_WEIGHTS)
MATCHERS ?=
DATASET ?=
PROTOCOL ?=
BASE ?=
JOBS ?= auto
DOWNLOAD ?=
FULL ?=

NEMF = $(VENV)/bin/nemf
READY = $(VENV)/.ready
ROOT = $(if $(DATA),$(DATA),$(OUT)/synthetic)

# mlflow looks up a telemetry host by default; this project sends nothing.
export MLFLOW_DISABLE_TELEMETRY = true

.DEFAULT_GOAL := help
.PHONY: help setup test test-long lint reproduce-table1 reproduce-table2 compare figures regress bench ui backbone tiny docs

help: ## Show the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## Make the virtual environment (a second call does nothing)

# torch first and by pip, so that a CPU build that pip knows of is taken.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "torch>=2.6,<2.14"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

# $(1): the table's number. Without DATA, stand-ins are rendered and recipes of the table trained.
define reproduce
	$(if $(DATA),,$(NEMF) data make-synthetic $(ROOT))
	$(NEMF) predict --table $(1) --data "$(ROOT)" --out $(OUT) $(if $(DATA),,--train) $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
		$(if $(MATCHERS),--matchers "$(MATCHERS)") $(if $(FULL),--full) $(if $(DOWNLOAD),--download)
	$(NEMF) score --table $(1) --out $(OUT)
	$(NEMF) table $(1) --data "$(ROOT)" --out $(OUT)
endef

reproduce-table1: $(READY) ## Table 1: DATA=<root of the datasets>, or synthetic stand-ins without
	$(call reproduce,1)

reproduce-table2: $(READY) ## Table 2, the classes of SPair-71k: DATA= as for Table 1
	$(call reproduce,2)

# Pictures need the dataset: DATA, or the stand-ins that an earlier target rendered.
compare: $(READY) ## Compare predictions in OUT: MATCHERS="nemf cats" [DATASET= PROTOCOL= DATA=]
	$(NEMF) compare $(MATCHERS) --out $(OUT) $(if $(DATASET),--dataset "$(DATASET)") \
		$(if $(PROTOCOL),--protocol "$(PROTOCOL)") \
		$(if $(DATA)$(wildcard $(OUT)/synthetic),--data "$(ROOT)")

figures: $(READY) ## Figures of what lies in OUT [MATCHERS= DATASET= PROTOCOL= DATA= WEIGHTS=]
	$(NEMF) figure all --out $(OUT) $(if $(MATCHERS),--matchers "$(MATCHERS)") \
		$(if $(DATASET),--dataset "$(DATASET)") $(if $(PROTOCOL),--protocol "$(PROTOCOL)") \
		$(if $(WEIGHTS),--weights "$(WEIGHTS)") \
		$(if $(DATA)$(wildcard $(OUT)/synthetic),--data "$(ROOT)")

# The data are the policy's: $NEMF_DATA does not count, DATA= on the command line does.
regress: $(READY) ## Worse, slower, hungrier than BASE=<commit>? Without: than the accepted scores
	$(NEMF) regress --out $(OUT) $(if $(BASE),--base "$(BASE)") \
		$(if $(filter command,$(origin DATA)),--data "$(DATA)") \
		$(if $(WEIGHTS),--weights "$(WEIGHTS)")

test: $(READY) lint ## Unit, contract, golden, import-direction and real-data tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) -m "not long"

test-long: $(READY) ## What takes longer: whole jobs, kills, README commands
	$(VENV)/bin/python -m pytest -m long

docs: $(VENV)/.docs ## The documentation as a site: OUT/site/index.html opens offline
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --site-dir "$(abspath $(OUT))/site"

$(VENV)/.docs: $(READY)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

lint: $(READY) ## ruff: lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY) ## Speed of the suite itself, as ratios within one run
	$(NEMF) bench
	$(VENV)/bin/python -m tests.benchmarks.nemf_search 375 500

backbone: $(READY) ## Train the small CNN that ships for the synthetic job
	$(NEMF) train experiments/configs/training/resnet_small.py --out $(OUT)
	cp $(OUT)/training/resnet_small/resnet_small.pth experiments/weights/resnet_small.pth

tiny: $(READY) ## Train the tiny CATs and NeMF that ship for the regression gate
	$(NEMF) data make-synthetic $(OUT)/synthetic
	for name in cats_tiny nemf_tiny; do \
		$(NEMF) train $$name --no-mlflow --data $(OUT)/synthetic --out $(OUT) && \
		cp $(OUT)/training/$$name/$$name.pth experiments/weights/$$name.pth || exit 1; done

ui: $(READY) ## MLflow's page on the runs in OUT (or MLFLOW_TRACKING_URI)
	$(VENV)/bin/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(abspath $(OUT))/mlflow.db}"
