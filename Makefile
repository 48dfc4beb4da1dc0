# The environment, the demo and the tests, each from a fresh clone: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)

.PHONY: env demo test lint docs clean

env: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -f .venv/.installed || $(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

demo: .venv/.demo
	$(BIN)/lmcompress run configs/smollm2/quickstart.yaml

lint: env
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: env lint
	$(RUN)/pytest

docs: env
	$(RUN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv docs/_build .pytest_cache .ruff_cache
