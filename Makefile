# Everything here needs only python3 and make: the first target that wants it makes .venv.
# PIP_FIND_LINKS, where set, is a folder or page of wheels that uv looks at too (a CPU build of torch, say).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := UV_FIND_LINKS="$(PIP_FIND_LINKS)" VIRTUAL_ENV="$(abspath $(VENV))" $(BIN)/uv

# What asks for equal bits, or for bounds where shapes differ: quick, and of every kind.
SHAPED := tests/test_layer.py tests/test_adapter_file.py tests/test_nonfinite_tokens.py tests/test_train_optim.py \
  tests/test_videodit_codec.py::test_pieces_of_a_video_are_the_whole \
  tests/test_videodit_codec.py::test_the_figures_of_the_notice_are_true \
  tests/test_videodit_precompute.py::test_a_run_that_ends_among_the_files_goes_on_to_the_same_bytes \
  tests/test_videodit_precompute.py::test_latents_are_the_vaes_on_the_whole_video \
  tests/test_moshi_data.py::test_left_is_moshi_right_is_the_user

export NO_TORCH_COMPILE = 1
# Without bytecode beside the packages every process of a test would compile torch anew: 5 s and more.
unexport PYTHONDONTWRITEBYTECODE

# plugins/example is not installed: tests/test_example.py builds it and installs it into a folder of its own.
.DEFAULT_GOAL := help
.PHONY: help setup demo test rounding kernels interpret wheels bench lint types format clean constraints rules example

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything into it

$(STAMP): pyproject.toml plugins/moshi/pyproject.toml plugins/videodit/pyproject.toml \
  plugins/transformers/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ttt needs Python 3.10 or newer; this is $$($(PYTHON) --version). Set PYTHON=python3.12, say."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) pip install --quiet --constraint constraints.txt --editable . --editable plugins/moshi --editable plugins/videodit \
	  --editable plugins/transformers --group dev
	@touch $@

demo: $(STAMP) ## train TTT layers in a small Moshi on real speech, on this machine, now
	$(BIN)/ttt train --backbone moshi

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

rounding: $(STAMP) ## run what asks for equal bits under another instruction set and another maker's rounding
	TTT_OTHER_ROUNDING=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	  $(BIN)/python -m pytest -q -n 2 --dist worksteal $(SHAPED)

kernels: $(STAMP) ## compile every form of the kernels for GPUs, without one, and write the table anew
	$(BIN)/python benchmarks/kernels.py --compile

interpret: $(STAMP) ## run the kernels in Triton's interpreter, through cases with every pair of values
	$(BIN)/python benchmarks/kernels.py --interpret

# What `ttt` and Moshi's plugin need beside torch, Triton and numpy. One of a kind: they are unpacked beside each other.
WHEELS := pydantic pydantic-core annotated-types typing-extensions typing-inspection pluggy typer click annotated-doc \
  rich markdown-it-py mdurl pygments shellingham safetensors pyyaml packaging \
  moshi sentencepiece sphn einops huggingface-hub tqdm httpx2 httpcore2 h11 anyio idna truststore
WHEELS_PYTHON ?= 3.12

wheels: $(STAMP) ## gather the wheels that benchmarks/first_gpu.sh needs where there are only torch and triton
	rm -rf dist/wheels
	for each in . plugins/moshi plugins/videodit plugins/transformers; do $(UV) build --quiet --wheel --out-dir dist/wheels $$each; done
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest dist/wheels \
	  --python-version $(WHEELS_PYTHON) --implementation cp --platform manylinux2014_x86_64 \
	  $(foreach n,17 24 27 28 31 34,--platform manylinux_2_$(n)_x86_64) --constraint constraints.txt $(WHEELS)
	du -sh dist/wheels

bench: $(STAMP) ## time and weigh the scan beside what is published, on this CPU: about an hour
	$(BIN)/python benchmarks/scan.py

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

format: $(STAMP) ## put the code in its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rules: $(STAMP) ## write docs/rules.md anew from the rules' explanations
	$(BIN)/python -m ttt.check.explain > $(VENV)/rules.md
	mv $(VENV)/rules.md docs/rules.md

example: $(STAMP) ## write plugins/example anew from the template of `ttt new-backbone`
	rm -rf $(VENV)/example
	$(BIN)/ttt new-backbone example --out $(VENV)/example > /dev/null
	rm -rf plugins/example
	mv $(VENV)/example plugins/example

constraints: $(STAMP) ## pin anew what constraints.txt pins (then run the tests)
	@echo '# What this project is tested with; `make setup` installs these. Made by `make constraints`.' > $(VENV)/pins
	echo torch==2.13.0 > $(VENV)/torch  # as a constraint: pyproject's override outdoes a requirement
	printf -- '-e .\n-e plugins/moshi\n-e plugins/videodit\n-e plugins/transformers\n' | UV_FIND_LINKS= PIP_FIND_LINKS= $(BIN)/uv pip compile - --quiet \
	  --constraint $(VENV)/torch \
	  --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  --no-emit-package ttt-adapters --no-emit-package ttt-moshi --no-emit-package ttt-videodit \
	  --no-emit-package ttt-transformers --group pyproject.toml:dev >> $(VENV)/pins
	mv $(VENV)/pins constraints.txt

clean: ## remove .venv and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
