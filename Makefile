# Every target works in a fresh clone: .venv is made on first use from PyPI.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all check lint bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/xenbus demo $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST)

# One environment a Python that this machine has, each with the whole suite.
test-all:
	@for v in 3.11 3.12 3.13 3.14; do \
	  if command -v python$$v >/dev/null && python$$v -c 'import venv' 2>/dev/null; then \
	    echo "== python$$v"; $(MAKE) --no-print-directory test PYTHON=python$$v VENV=.venv-$$v || exit 1; \
	  else echo "== python$$v: not on this machine"; fi; done

check: lint
	$(BIN)/python -m pytest -m 'not slow' -x

lint: $(STAMP)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m bench $(BENCH)

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
