# Every target works in a fresh clone: .venv is made on first use from PyPI.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help oracle demo test test-all check lint fuzz bench pyz xen-test xen-test-all xen-bench xen-shell clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.* ## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP) ## the whole of it, shown and checked (DEMO="--hold")
	$(BIN)/xenbus demo $(DEMO)

test: $(STAMP) ## all tests (PYTEST="tests/bus -k suspend")
	$(BIN)/python -m pytest $(PYTEST)

# Every Python from 3.11 on that this machine has, on the path or below pyenv: one environment and the whole suite each.
PYTHONS := $(wildcard $(foreach v,11 12 13 14,$(HOME)/.pyenv/versions/3.$(v).*/bin/python3.$(v)))
test-all: ## the same with every Python from 3.11 on that this machine has
	@for python in python3.11 python3.12 python3.13 python3.14 $(PYTHONS); do \
	  version=$$($$python -c 'import sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  case " $$done " in *" $$version "*) continue;; esac; done="$$done $$version"; \
	  echo "== Python $$version"; \
	  $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$version || exit 1; \
	done; echo "passed on:$$done"

check: lint ## lint and the quick tests
	$(BIN)/python -m pytest -m 'not slow' -x

lint: $(STAMP) ## ruff, mypy, the import rules
	$(BIN)/ruff check src tests bench tools
	$(BIN)/ruff format --check src tests bench tools
	$(BIN)/mypy
	$(BIN)/lint-imports

MINUTES ?= 5
fuzz: $(STAMP) ## the store under atheris, guided by coverage (MINUTES=60 FUZZ="wire ring")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3'
	$(BIN)/python -m tests.xenstore.fuzz --minutes $(MINUTES) $(FUZZ)

bench: $(VENV)/.bench ## benchmarks (BENCH="--quick block")
	$(BIN)/python -m bench $(BENCH)

# With the peers that PyPI has; Debian's are named in docs/bench.md.
$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	touch $@

oracle: $(STAMP) ## random actions on ours and on Debian's daemons, compared (MINUTES=60 ORACLE="--pair o")
	$(BIN)/python -m tests.xenstore.oracle.play --minutes $(MINUTES) $(ORACLE)

pyz: xenbus.pyz ## the command in one file, which python3 runs with nothing installed

xenbus.pyz: $(STAMP) $(shell find src tools/pyz -type f -not -name '*.pyc')
	$(BIN)/python tools/pyz/build.py $@

# A real Xen under QEMU's software emulation; its parts are built once and kept, see tools/xen/README.md.
xen-test: xenbus.pyz ## tests/xen in a dom0 under QEMU (XEN="tests/xen/test_linux.py")
	$(PYTHON) tools/xen/lab.py test $(XEN)

xen-test-all: xenbus.pyz ## the same with the whole table of features
	$(PYTHON) tools/xen/lab.py all $(XEN)

xen-bench: ## speed there, beside Linux's and QEMU's back ends (XEN_BENCH="--quick net")
	$(PYTHON) tools/xen/lab.py bench $(XEN_BENCH)

xen-shell: ## a prompt in that dom0
	$(PYTHON) tools/xen/lab.py shell

clean: ## removes what the others made
	rm -rf xenbus.pyz xen-results* $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .fuzz
