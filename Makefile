# make demo: a question answered by SmolLM2-135M.   make test: the tests.   make accuracy: what quantization costs it.
# make bench: how fast it is beside llama.cpp and OpenVINO.   make gpu-check: kernels on an NVIDIA GPU.
# PYTHON=python3.13 chooses another Python.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10 --timeout 60

# Of `make bench`: interpreters that have llama-cpp-python, and openvino-genai with optimum-intel; rounds to take medians of.
LLAMACPP ?= $(BIN)/python
OPENVINO ?= $(BIN)/python
REPEATS ?= 3

.PHONY: demo test accuracy bench gpu-check lint clean

demo: $(VENV)/.installed
	@$(BIN)/llmir generate "What is the capital of France?"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

# The README's table, on stdout: twelve minutes on two cores. The text for calibration is another than the one it is measured on.
accuracy: $(VENV)/.installed
	@$(BIN)/llmir accuracy smollm2-135m --text tests/data/gpl-3.0.txt --prompts tests/data/smollm2_greedy.json --calibrate LICENSE

# Everything that is compared with others: about ten minutes on two cores.
BENCH = $(BIN)/llmir bench smollm2-135m --prefill 512 --context 1500 --repeats $(REPEATS) \
  --python llama.cpp=$(LLAMACPP) --python openvino=$(OPENVINO) --baseline llama.cpp --baseline openvino
bench: $(VENV)/.installed
	@$(BENCH) -q int4 --baseline openvino:int8 --batch 16,64 --sampled --startup
	@echo
	@$(BENCH) -q int8

# On a machine with an NVIDIA GPU, with Python 3.12 or later: are its kernels right, how fast are they, and models with them.
# In an environment of its own, since jax-triton wants JAX 0.11. GPU_CHECK=--dry-run goes through it without a GPU.
GPU_VENV ?= .venv-gpu
GPU_CHECK ?=
gpu-check: $(GPU_VENV)/.installed
	@$(GPU_VENV)/bin/python -m llmir_jax.bench.gpu_check $(GPU_CHECK)

$(GPU_VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("gpu-check: Python 3.12 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": give PYTHON=…" if sys.version_info < (3, 12) else 0)'
	$(PYTHON) -m venv $(GPU_VENV)
	@echo "installing into $(GPU_VENV): some minutes, once"
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[gpu]' 'jax[cuda12]>=0.11,<0.12'
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that exists is kept: only what pyproject.toml asks for is brought up to date.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": give PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	@echo "installing into $(VENV): a minute or two, once"
	@$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	@echo "installing into $(VENV), with what the tests need: a minute or two, once"
	@$(PIP) install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@
