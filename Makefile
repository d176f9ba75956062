# Everything runs in an environment of its own below $(VENV); `make setup` makes it once.
PYTHON ?= python3
VENV ?= .venv
OUT ?= outputs
DATA ?= $(NEMF_DATA)
WEIGHTS ?= $(NEMF_WEIGHTS)
MATCHERS ?=
JOBS ?= auto
DOWNLOAD ?=

NEMF = $(VENV)/bin/nemf
READY = $(VENV)/.ready
ROOT = $(if $(DATA),$(DATA),$(OUT)/synthetic)

# mlflow looks up a telemetry host by default; this project sends nothing.
export MLFLOW_DISABLE_TELEMETRY = true

.DEFAULT_GOAL := help
.PHONY: help setup test test-long lint reproduce-table1 bench ui backbone

help: ## Show the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## Make the virtual environment (a second call does nothing)

# torch first and by pip, so that a CPU build that pip knows of is taken.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "torch>=2.4,<2.14"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

reproduce-table1: $(READY) ## Table 1: DATA=<root of the datasets>, or synthetic stand-ins without
ifeq ($(DATA),)
	$(NEMF) data make-synthetic $(ROOT)
endif
	$(NEMF) predict --table 1 --data "$(ROOT)" --out $(OUT) $(if $(DATA),,--train) $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
		$(if $(MATCHERS),--matchers "$(MATCHERS)") $(if $(DOWNLOAD),--download)
	$(NEMF) score --table 1 --out $(OUT)
	$(NEMF) table 1 --out $(OUT)

test: $(READY) lint ## Unit, contract, golden, import-direction and real-data tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) -m "not long"

test-long: $(READY) ## What takes longer: whole jobs, kills, README commands
	$(VENV)/bin/python -m pytest -m long

lint: $(READY) ## ruff: lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY) ## Speed of the suite itself, as ratios within one run
	$(NEMF) bench

backbone: $(READY) ## Train the small CNN that ships for the synthetic job
	$(NEMF) train experiments/configs/training/resnet_small.py --out $(OUT)
	cp $(OUT)/training/resnet_small/resnet_small.pth experiments/weights/resnet_small.pth

ui: $(READY) ## MLflow's page on the runs in OUT (or MLFLOW_TRACKING_URI)
	$(VENV)/bin/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(abspath $(OUT))/mlflow.db}"
