# One target for each thing a person does. Needs Python 3.11 or newer with `venv`, and a package index.

PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
HOST ?= 127.0.0.1
PORT ?= 8000
IMAGES ?=

DEV := .venv
DEMO := .venv-demo
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench starter docker clean install-dev chromium

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(DEMO)/installed ## Build the demo collection and serve it (IMAGES=folder for your own, PORT=8000)
	$(DEMO)/bin/embedserve demo --data .demo $(if $(IMAGES),--images "$(IMAGES)")
	exec $(DEMO)/bin/embedserve serve --data .demo --host $(HOST) --port $(PORT)

test: install-dev chromium ## Lint, type-check and test everything
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/python -m pytest

lint: install-dev ## Lint and type-check
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

format: install-dev ## Format and fix what can be fixed
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

bench: install-dev ## Run the benchmarks (see benchmarks/README.md)
	$(DEV)/bin/python -m benchmarks.decode
	$(DEV)/bin/python -m benchmarks.memory
	$(DEV)/bin/python -m benchmarks.serving

starter: install-dev ## Build the bundled encoder anew
	$(DEV)/bin/embedserve export starter --out embedserve/starter

docker: ## Build the serving image
	docker build -t embedserve .

clean: ## Remove environments, caches and the demo's data
	rm -rf $(DEV) $(DEMO) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build

install-dev: $(DEV)/installed

$(DEV)/installed: pyproject.toml constraints.txt
	$(call make-venv,$(DEV))
	$(DEV)/bin/python $(PIP_INSTALL) -e '.[dev,train,demo]'
	@touch $@

$(DEMO)/installed: pyproject.toml constraints.txt
	$(call make-venv,$(DEMO))
	$(DEMO)/bin/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

# A venv that a failed run left half made is made anew.
define make-venv
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef

chromium:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "Installing chromium for the page's tests" && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
	  echo "The page's tests need Chromium or Chrome: install one (Debian: sudo apt-get install chromium)." >&2; exit 1; \
	fi
