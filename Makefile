# make quickstart | test | test-all | check | gpu. Everything is installed below .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= configs/quickstart.yaml
RUN ?= $(basename $(notdir $(CONFIG)))-$(shell date +%Y%m%d-%H%M%S)
WORKERS ?= auto
PART ?= check

.PHONY: quickstart test test-all check gpu clean

quickstart: $(READY)
	$(BIN)/trilevel pack sklearn:digits shards/digits
	$(BIN)/python -m launch local $(CONFIG) name=$(RUN)
	$(BIN)/trilevel report runs/$(RUN)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 1800

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# On a GPU host: its own Python and torch, the source tree as it is, nothing installed by us, no network. PYTHONPATH may name more.
# make gpu PYTHON=python3 PART="facts check run resume step loop engine profile input sparse study" OUT=results LIMIT=235
gpu:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) -m trainer.bench.gpu $(PART) $(if $(OUT),--out $(OUT)) $(if $(LIMIT),--limit $(LIMIT))

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) shards build *.egg-info
