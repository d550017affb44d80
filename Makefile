# `make book` and `make test` do everything on a fresh machine with Python 3.11 or newer; `make help` lists the rest.
# Nothing is installed outside .venv and the user's cache folder. No conda needed.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?=
JOBS ?=
WORKERS ?=
NB ?=
TO ?=
P ?=
T ?=
B ?=

# All tests: a process a core, at most 8. Tests of one file stay together, for what they share is made once.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist loadfile

# What of them needs the package's dependencies alone, and no tool of the book.
LIBRARY := $(wildcard tests/test_cache_*.py tests/test_kernels_*.py tests/test_methods_*.py) \
	$(patsubst %,tests/test_%.py,assets decode devices fit fixed models package records tasks texts tools)

PY := $(VENV)/bin/python
KVREPRO := $(PY) -m kvrepro
INSTALLED := $(VENV)/.installed
FETCHED := $(VENV)/.fetched

.DEFAULT_GOAL := help
.PHONY: help env fetch papers book notebook test ends bench lint clean distclean

help: ## this list
	@echo "kvrepro: KV-cache merging, reproduced"
	@echo
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo "  make book PROFILE=smoke|quick|gpu|paper     default: quick, or gpu where CUDA is found"
	@echo "  make book JOBS=1                            notebooks that run at a time; default: one a core, at most 4"
	@echo "  make book WORKERS=8                         processes that measure cells side by side, also on one GPU"
	@echo '  make notebook NB=weightedkv/perplexity P="budget=128 window=2048"'
	@echo '  make test T="tests/test_book.py -k stamp"   arguments for pytest'
	@echo '  make bench B="--piece prefill,decode"       python -m benchmarks --help lists the choices'
	@echo "  PYTHON=python3.12 make book                 another interpreter; VENV=folder for another environment"

book: $(FETCHED) ## environment, embedded model, experiments, pages; prints the page to open
	@$(KVREPRO) build $(if $(PROFILE),--profile "$(PROFILE)") $(if $(JOBS),--jobs "$(JOBS)") \
		$(if $(WORKERS),--workers "$(WORKERS)")

notebook: $(FETCHED) ## run one notebook (NB) with new parameters (P)
	@test -n "$(NB)" || { echo 'say which notebook: make notebook NB=weightedkv/perplexity P="budget=128"'; exit 2; }
	@$(KVREPRO) run $(if $(PROFILE),--profile "$(PROFILE)") "$(NB)" $(if $(P),'$(P)')

test: $(FETCHED) ## environment, embedded model, test suite (with a smoke build of the book and its pages in Chromium)
	@$(PY) -m pytest $(or $(T),$(SIDE_BY_SIDE))

ends: end-lowest end-newest ## the library's tests with the lowest and the newest versions it allows (own environments, 12 GB)

end-lowest: VERSIONS := --constraint tests/lowest.txt
end-newest: VERSIONS := --upgrade --upgrade-strategy eager
end-%:
	@$(PYTHON) -m venv .ends/$*
	@.ends/$*/bin/python -m pip install --disable-pip-version-check $(VERSIONS) -e '.[test]'
	@OMP_NUM_THREADS=1 .ends/$*/bin/python -m pytest $(SIDE_BY_SIDE) $(LIBRARY)

bench: $(INSTALLED) ## timings beside their peers and floors (B="--quick" on a machine without a large GPU)
	@$(PY) -m benchmarks $(B)

lint: $(INSTALLED) ## ruff, on the package and the notebooks
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

env: $(INSTALLED) ## the environment alone

fetch: $(FETCHED) ## the embedded model and texts

papers: $(INSTALLED) ## the papers' own models and data, tens of GB (TO=folder); goes on where it stopped
	@$(KVREPRO) fetch papers $(if $(TO),--to "$(TO)")

# One pip call for everything that has requirements of its own, so that all of them are resolved together.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "kvrepro needs Python 3.11 or newer; %s is %d.%d. Try PYTHON=python3.12 make book" % (sys.executable, v[0], v[1]))'
	@echo "Installing the environment into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not make $(VENV): on Debian and Ubuntu, install python3-venv"; exit 1; }
	@$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(FETCHED): $(INSTALLED) kvrepro/assets.py
	@$(KVREPRO) fetch
	@touch $@

clean: ## remove the built pages and executed notebooks; measured records stay
	rm -rf _build book/results book/_generated book/status.md

distclean: clean ## also the environments
	rm -rf $(VENV) .ends
