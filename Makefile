# make demo    train a deep equilibrium model on real text, in minutes
# make test    style, types, layers and all tests that are not marked slow
# make check   the slow tests too: several processes, compilation, campaigns
# make paper   the claims and tables of the paper: hours; DATA is a folder with the Penn Treebank
# make docs    the documentation as a site that needs no server and no network: site/index.html
# make install the virtual environment alone

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DATA ?= data/ptb
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test check paper docs install lint clean

install: $(STAMP)

# torch first and pinned, so that nothing that depends on it can bring in another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/equilibria train tiny --out $(RUN) --overwrite

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n 2 -m "not slow"

check: lint
	$(BIN)/pytest -n 2

paper: $(STAMP)
	$(BIN)/python benchmarks/paper.py --data $(DATA)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
