PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH := torch==2.13.0
# Python 3.11's own pip takes twice the processor time for the rest.
PIP := pip==26.3
BIN := $(VENV)/bin
OUT := out
AUDIT := $(OUT)/audit

# Threads that spin while they wait take the cores from other processes: of three traces at once, each took two to five
# times as long. A trace alone takes about the same time either way.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help env run lab test quick fuzz lint audit format hooks lock corpus demo image image-test clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.ready ## make the environment in $(VENV) (run and test do it themselves)

# Nothing is compiled here: Python compiles what it imports, which is a fourth of what is installed.
$(VENV)/.ready: pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
	"moekit needs Python 3.11 or 3.12; $(PYTHON) is %d.%d. Give another: make PYTHON=/path/to/python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(PIP)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes --no-deps -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

run: env ## run_inference.ipynb on the demo model, four ranks; results in out/run_inference
	@mkdir -p $(OUT)
	$(BIN)/papermill notebooks/run_inference.ipynb $(OUT)/run_inference.ipynb \
		-p world_size 4 -p output_dir $(OUT)/run_inference
	@echo "The notebook as it ran: $(OUT)/run_inference.ipynb; its figures: $(OUT)/run_inference/"

lab: env ## JupyterLab with the notebooks, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=notebooks \
		--LabApp.app_settings_dir="$(CURDIR)/docker/jupyter" --LabApp.default_url=/lab/tree/README.ipynb

test: env lint ## all tests: the slow ones beside the others, then the slow ones of kernels
	@.ci/test $(BIN)/python

quick: env ## the tests that start no browser and few processes
	$(BIN)/python -m pytest -m "not slow"

fuzz: env ## the property tests for longer (FUZZ=5000 make fuzz), 50 interrupts, and 200 kills
	FUZZ=$${FUZZ:-5000} INTERRUPTS=50 KILLS=200 $(BIN)/python -m pytest tests/test_*fuzz*.py \
		tests/test_faults.py::test_interrupts_at_random_moments \
		tests/test_results.py::test_files_of_notebooks_are_whole_after_kills

lint: env ## ruff, which folder may import which, and notebooks without outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

audit: ## what is known about the security of the locked packages
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1; }
	@$(AUDIT)/bin/python .ci/audit.py requirements.lock

format: env ## put code and notebooks in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb

hooks: env ## a git hook that refuses what lint refuses
	@printf '#!/bin/sh\nexec make --silent lint\n' > "$$(git rev-parse --git-path hooks)/pre-commit"
	@chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

# torch, whose build depends on the machine, is installed by itself. What only torch needs is left out of the lock files.
LOCK := uv pip compile pyproject.toml --extra lab --extra eval --generate-hashes --python-version 3.11 --no-header --no-annotate --quiet \
	$(foreach name,torch cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
	nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand \
	nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 \
	nvidia-nvtx,--no-emit-package $(name))

lock: ## pin everything again (needs uv)
	$(LOCK) --no-emit-package triton --output-file requirements.lock
	$(LOCK) --no-emit-package triton --extra cluster --output-file requirements-cluster.lock
	$(LOCK) --group dev --output-file requirements-dev.lock

corpus: env ## make the demo's corpus and tokenizer again (Debian; about 4 minutes)
	$(BIN)/python -m moekit.demo.corpus --out $(OUT)/corpus

demo: env ## train the demo models again on that corpus (8 minutes on a GPU)
	$(BIN)/python -m moekit.demo.train --data $(OUT)/corpus --out moekit/demo/model
	$(BIN)/python -m moekit.demo.train --kind dense --data $(OUT)/corpus --out moekit/demo/dense

image: ## build the container image; docker/run.sh starts it
	docker/build.sh

image-test: env ## build it and try it as a user would (starts a Docker engine if none answers)
	PYTHON=$(BIN)/python tests/docker/ci.sh

clean: ## remove the environment and what was made
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .ruff_cache .hypothesis
