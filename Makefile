# Every target sets up what it needs in .venv first. Needs Python >= 3.11 and a package index, nothing else.

.PHONY: venv lint format test test-slow test-exhaustive quickstart bench docs clean
.DEFAULT_GOAL := venv
.DELETE_ON_ERROR:

# The newest suitable interpreter; `make PYTHON=/path/to/python3.12 test` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
STAMP := .venv/.installed
SYSTEM_SITE := $(shell nvidia-smi >/dev/null 2>&1 && echo --system-site-packages)

venv: $(STAMP)

# With an NVIDIA GPU the torch of the machine is right, because it fits the driver: the venv sees it, and one is installed
# only if there is none. Without a GPU torch is pinned and installed first, and the constraint keeps the rest from replacing it.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none of python3 ... python3.11 is" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(SYSTEM_SITE) .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a venv; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (a minute or two, once)"
	@if [ -n "$(SYSTEM_SITE)" ]; then \
		$(PY) -c 'import torch' 2>/dev/null || $(PIP) install 'torch>=2.9'; \
	else $(PIP) install 'torch==2.13.0'; fi
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	@$(PIP) install --constraint .venv/constraints.txt --editable '.[dev]'
	@$(PY) -c 'import importlib.util as u; print("native extension:", "yes" if u.find_spec("megatron_llm._native") \
		else "no (C++ compiler missing: numpy is used, slower but the same results)")'
	@touch $@

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Processes that tests run in, each with up to 8 ranks of its own: `make JOBS=8 test` on a large machine.
JOBS ?= 2
PYTEST := $(PY) -m pytest --numprocesses $(JOBS) --no-loadscope-reorder --durations 30 --durations-min 10

test: $(STAMP)
	$(PYTEST) -m "not slow and not exhaustive"

test-slow: $(STAMP)
	$(PYTEST) -m slow

# Every combination of which the slow tests take some. Hours; before a release, or after a change to what is combined.
test-exhaustive: $(STAMP)
	$(PYTEST) -m exhaustive

quickstart: $(STAMP)
	$(PY) examples/quickstart/run.py

bench: $(STAMP)
	$(PY) benchmarks/train_vs_transformers.py
	$(PY) benchmarks/preprocess.py
	$(PY) benchmarks/tokenizer_speed.py
	$(PY) benchmarks/open_rows.py
	$(PY) benchmarks/packing.py
	$(PY) benchmarks/pipeline_schedules.py
	$(PY) benchmarks/update.py
	$(PY) benchmarks/data_parallel.py
	$(PY) benchmarks/overlap.py
	$(PY) benchmarks/checkpoint.py
	$(PY) benchmarks/hf_folders.py
	$(PY) benchmarks/scale_simulation.py --figure docs/scale.png

# Into build/site; open index.html there, no server is needed.
docs: $(STAMP)
	$(PY) docs/list_settings.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf .venv build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f megatron_llm/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
