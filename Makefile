# make demo | reproduce | test | check | test-slow | gpu-check | build | clean. Each target makes what it needs; a second call installs nothing.

PYTHON := .venv/bin/python
EXTENSION_SOURCES := setup.py $(shell find csrc -type f)

# Any text or JSONL (.gz, .zst) file to train on, and any tokenizer.json: make demo CORPUS=… TOKENIZER=…
CORPUS :=
TOKENIZER :=
TEXT = $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)")

# Tests at a time. Each may start a job of four processes.
TEST_JOBS := 2

# Which of the slow tests: those marked long do at full size what others do at a smaller one.
SLOW := slow or long

# Which question of the paper to ask, at which size (micro: a CPU, small: a GPU); all and what the machine has, unless told.
QUESTION :=
SIZE :=

# Other settings build another extension (setup.py says which there are). auto takes whichever is there.
SPARSECOD_CUDA ?= auto
INSTALLED := .venv/.installed$(if $(filter-out auto,$(SPARSECOD_CUDA)),-$(SPARSECOD_CUDA))

.PHONY: help demo reproduce test test-slow check gpu-check build clean

help:
	@echo "make demo       train and score two small models, and report on both (CORPUS=path TOKENIZER=path to use your own)"
	@echo "make reproduce  ask the paper's questions at a small size (QUESTION=weight_decay, SIZE=micro or small)"
	@echo "make test       run the tests that take seconds"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make check      lint, formatting and types"
	@echo "make gpu-check  on a machine with a GPU: build, test, sanitize and benchmark the kernels (PYTHON=python3: without .venv)"
	@echo "make build      make .venv and build the extension, nothing more"
	@echo "make clean      remove what was built; .venv and runs/ stay"

demo: build
	$(PYTHON) tools/demo.py $(TEXT)

reproduce: build
	$(PYTHON) tools/reproduce.py $(if $(SIZE),--size "$(SIZE)") $(if $(QUESTION),--question "$(QUESTION)") $(TEXT)

test: build
	$(PYTHON) -m pytest -q -n $(TEST_JOBS) --dist worksteal -m "not slow and not long and not gpu" --durations=10

test-slow: build
	$(PYTHON) -m pytest -q -m "$(SLOW)" --durations=20

check: build
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# An interpreter that is named on the command line has to have the dependencies, and may do without nvcc.
gpu-check: $(if $(filter .venv/%,$(PYTHON)),.venv/.dependencies)
	@$(PYTHON) benchmarks/gpu_check.py

build: $(INSTALLED)

# The stamps are written by the last command of their recipe: whatever was interrupted runs again.
.venv/.dependencies: constraints.txt tools/bootstrap.sh
	@tools/bootstrap.sh environment constraints.txt
	@touch $@

$(INSTALLED): .venv/.dependencies pyproject.toml $(EXTENSION_SOURCES)
	@rm -f .venv/.installed*
	@SPARSECOD_CUDA=$(SPARSECOD_CUDA) tools/bootstrap.sh install
	@touch .venv/.installed $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv/.installed*
	find sparsecod_mcore csrc tests tools examples benchmarks \
		'(' -name '*.so' -o -name '*.o' -o -name __pycache__ ')' -prune -exec rm -rf '{}' +
