# make setup | demo | test | test-floors | docs | build | clean. All but clean run setup first, and
# test-floors has an environment of its own. ARGS goes to the recipe or to pytest:
# make demo ARGS="--seeds 3", make test ARGS="-k smkd".
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FLOORS := .venv-floors
PYTEST := pytest -q -n logical --maxprocesses 4 --dist worksteal
LAUNCH := $(BIN)/accelerate launch -q --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

# torch>=2.8 -> torch==2.8
LOWEST := import re, tomllib; needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
  print(*(re.sub(r">=([\d.]+).*", r"==\1", need) for need in needs), sep="\n")

.PHONY: setup demo test test-floors docs build clean
.DELETE_ON_ERROR:

setup: $(READY)

# The stamp is written last: after an interrupted setup, make starts over in an empty environment.
$(READY): pyproject.toml setup.cfg
	@$(PYTHON) -c "$(CHECK)" 2>/dev/null || { echo "setup needs Python 3.11 or newer with its venv module (on Debian and Ubuntu:" \
	  "apt install python3-venv), got: $$($(PYTHON) --version 2>&1). To use another one: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setup: installing the package and its tools into .venv, a few GB and some minutes the first time"
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[recipes,dev]"
	@touch $@

demo: $(READY)
	$(LAUNCH) recipes/webvision_mini.py $(ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m $(PYTEST) $(ARGS)

# The tests on exactly the lower bounds of pyproject.toml.
test-floors: $(FLOORS)/.ready
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m $(PYTEST) $(ARGS)

$(FLOORS)/.ready: pyproject.toml setup.cfg
	@$(PYTHON) -c "$(CHECK)" || { echo "needs Python 3.11 or newer with its venv module"; exit 1; }
	$(PYTHON) -m venv --clear $(FLOORS)
	$(PYTHON) -c '$(LOWEST)' > $(FLOORS)/lowest.txt
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check -c $(FLOORS)/lowest.txt -e ".[recipes,dev]"
	@touch $@

# The package index is asked only if the tools are not installed.
docs: $(READY)
	@$(BIN)/python -c "import mkdocs, material, mkdocstrings_handlers.python" 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "docs: serve it with $(BIN)/python -m http.server --directory site"

build: $(READY)
	rm -rf build dist # files of an earlier build would be packed again
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv $(FLOORS) build dist site *.egg-info
