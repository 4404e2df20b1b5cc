# make demo | make test: each sets up .venv from nothing first; a second call is quick.
# pip's own variables choose where packages come from, e.g. for a CPU build of torch (see the README):
#   PIP_EXTRA_INDEX_URL=<the index of CPU builds> make demo

VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
SETUP  := pyproject.toml setup.py constraints.txt
# The first Python of these that runs and is new enough; override with `make PYTHON=... demo`.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
            $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
MODEL  ?= minilm
# Tests run in a process per core, four at most: JOBS=0 runs them in one.
JOBS   ?= auto
PYTEST := $(PY) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal

.PHONY: demo test soak quick lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.with-demo
	$(VENV)/bin/graphwright demo --model $(MODEL)

test: $(VENV)/.with-test
	$(PYTEST) -m "not soak"

soak: $(VENV)/.with-test
	$(PYTEST) -m ""

quick: $(VENV)/.with-test
	$(PYTEST)

lint: $(VENV)/.with-test
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV)/.with-* build dist *.egg-info .pytest_cache .ruff_cache

$(PY):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or name it with 'make PYTHON=/path/to/python3.11'."; exit 1; }
	@echo "== virtual environment in $(VENV), from $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

# setuptools first, then no build isolation: the build uses the pinned version too.
$(VENV)/.with-demo: $(SETUP) | $(PY)
	@echo "== packages for the demo (torch and transformers are the large ones)"
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.with-test: $(VENV)/.with-demo
	@echo "== packages for the tests"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,test]'
	@touch $@
