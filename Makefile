# make demo: a question answered by SmolLM2-135M.   make test: the tests.   make accuracy: what quantization costs it.
# make bench: how fast it is beside llama.cpp and OpenVINO.   PYTHON=python3.13 chooses another Python.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10 --timeout 60

# Of `make bench`: interpreters that have llama-cpp-python, and openvino-genai with optimum-intel; rounds to take medians of.
LLAMACPP ?= $(BIN)/python
OPENVINO ?= $(BIN)/python
REPEATS ?= 3

.PHONY: demo test accuracy bench lint clean

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
	@echo
	@$(BENCH) -q w8a8

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
