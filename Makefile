# The environment, the demo, the tests and the benchmark, each from a fresh clone: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)
PEERS := .venv-peers
LLAMA_CPP := -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF

.PHONY: env demo test lint docs bench-peers clean

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

bench-peers: env $(PEERS)/.installed
	$(RUN)/python experiments/peers.py --config configs/smollm2/peers.yaml

# llama.cpp is compiled for this machine (five minutes on 2 cores); another's wheel would leave out what its CPU lacks.
$(PEERS)/.installed: experiments/peers-requirements.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="$(LLAMA_CPP)" $(PEERS)/bin/pip install --quiet --disable-pip-version-check \
	  --no-binary llama-cpp-python -r experiments/peers-requirements.txt
	touch $@

clean:
	rm -rf .venv $(PEERS) docs/_build .pytest_cache .ruff_cache
