# The environment, the demo, the tests and the benchmark, each from a fresh clone: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)
PEERS := .venv-peers
LLAMA_CPP := -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF

NATIVE := $(wildcard native/*.cpp native/*.h native/CMakeLists.txt)
SANITIZED := build/sanitized

.PHONY: env demo test lint docs bench-peers native-asan native-tsan clean

env: .venv/.installed

.venv/.installed: pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/.demo: pyproject.toml $(NATIVE)
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

# The kernel tests under AddressSanitizer and UBSan, and the sharing of work under ThreadSanitizer.
native-asan: env
	$(BIN)/pip install --quiet --disable-pip-version-check cmake ninja nanobind
	$(BIN)/cmake -G Ninja -S native -B $(SANITIZED) -DPython_EXECUTABLE=$$PWD/$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$$PWD/$(BIN)/ninja -DLMC_SANITIZE=address,undefined
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(RUN)/python native/tests/sanitized.py $(SANITIZED)/_native*.so -s tests/ops

native-tsan:
	mkdir -p $(SANITIZED)
	g++ -std=c++20 -O1 -g -fsanitize=thread -Wno-psabi -DLMC_ISA=portable -DLMC_NAME='"portable"' \
	  native/tests/threads.cpp native/kernels.cpp -o $(SANITIZED)/threads -pthread
	$(SANITIZED)/threads

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
