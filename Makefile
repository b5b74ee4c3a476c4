# Everything runs in .venv, on a machine that has Python 3.11 or newer, pip and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python -m
# A file is one worker's: fixtures and programs are made once.
PYTEST ?= -n auto --maxprocesses 4 --dist loadfile

.PHONY: help demo linearize-demo tasks test lint clean

help:
	@echo "make demo   train a small hybrid model on Python's own library, then generate from it"
	@echo "make linearize-demo"
	@echo "            train a small transformer, then linearize it in every way; 20 minutes"
	@echo "make tasks  compare every mixer on associative recall; twenty minutes on two cores"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make clean  remove .venv and caches; runs/ stays"

demo: $(VENV)/installed
	$(RUN) seqlab train configs/demo.py
	$(RUN) seqlab generate runs/demo --prompt "def " --steps 400 --temperature 0.8

linearize-demo: $(VENV)/installed
	$(RUN) benchmarks.linearize_demo

tasks: $(VENV)/installed
	$(RUN) benchmarks.tasks

test: $(VENV)/installed-test
	$(RUN) pytest $(PYTEST)

lint: $(VENV)/installed-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(RUN) pip install --disable-pip-version-check --quiet -e . -c constraints.txt
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(RUN) pip install --disable-pip-version-check --quiet -e '.[test]' -c constraints.txt
	touch $(VENV)/installed $@
