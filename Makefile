# make demo   train a language model in float32 and in mixed precision, in pairs, and give a verdict
# make test   the whole test suite
# make fuzz   hostile inputs of all kinds for an hour; MINUTES=5 for less
# make check  style, types, import floors
# make test-torch TORCH=2.15.0   the suite's fast half with another torch, in an environment of its own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test env-torch test-torch check install clean

# One stamp per set of dependencies: a changed pyproject.toml or constraints.txt installs again.
$(VENV)/.base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("mezzotint needs Python 3.11 or newer, this is %d.%d; pass PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "installing mezzotint into $(VENV) ..." >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "installing what tests and checks need ..." >&2
	@$(PIP) -e '.[test,check]'
	@touch $@

install: $(VENV)/.base

demo: $(VENV)/.base
	@$(BIN)/mezzotint demo

# Reports are tested in Chromium: the system's, Debian's package where we may install it, or playwright's own. Without
# any, those tests skip and say so.
$(VENV)/.browser: $(VENV)/.dev
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 \
	|| (test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 \
	    && echo "installing chromium ..." >&2 && apt-get update -qq \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null) \
	|| $(BIN)/playwright install chromium || echo "no Chromium: reports are not tested in a browser" >&2
	@touch $@

# One thread a process: two OpenMP teams on two cores wait for each other far longer than they compute.
test: $(VENV)/.dev $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Another torch has an environment of its own, of about 6 GB. PIP_CONSTRAINT replaces constraints that a machine sets.
TORCH ?= 2.15.0
OTHER := .venv-torch-$(TORCH)
env-torch: $(OTHER)/.dev

$(OTHER)/.dev: pyproject.toml constraints.txt
	@echo "installing torch $(TORCH) into $(OTHER) ..." >&2
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@{ grep -v '^torch==' constraints.txt; echo 'torch==$(TORCH)'; } > $(OTHER)/constraints.txt
	@PIP_CONSTRAINT=$(OTHER)/constraints.txt \
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

test-torch: $(OTHER)/.dev
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/campaign.py --minutes $(MINUTES)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-torch-* runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
