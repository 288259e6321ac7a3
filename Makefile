# Two commands: `make book` and `make test`. Works with GNU make 3.81 (macOS) and later.
PYTHON  ?= python3
PROFILE ?= default
OUT     ?= $(if $(filter default,$(PROFILE)),_build,_build/$(PROFILE))
JOBS    ?= 2
# Chapters that run at the same time. More than one makes what a chapter times on its page slower.
CHAPTERS ?= 1
# On Linux the default torch wheel carries CUDA (gigabytes). TORCH_INDEX=<address of an index with CPU wheels> avoids it.
TORCH_INDEX ?=

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help book slides pdf test measure lint pair ci clean distclean environment

help:  ## show this list
	@echo "make book [PROFILE=default|smoke] [OUT=folder]   run stale notebooks, build the HTML (warnings are errors)"
	@echo "make slides [PROFILE=...] [OUT=folder]           the book, then slides of three sessions in OUT/slides"
	@echo "make pdf [PROFILE=...] [OUT=folder]              the book, then all of it as one PDF, OUT/book.pdf (needs Chromium)"
	@echo "make test [JOBS=2] [ARGS='-k gates']             run the tests"
	@echo "make measure                                     measure what no recorded row has yet, all models; hours, resumable"
	@echo "make lint                                        style, format, layers of the package, types"
	@echo "make pair                                        rewrite notebooks/*.ipynb from notebooks/*.md"
	@echo "make ci                                          what continuous integration runs"
	@echo "make environment                                 only make .venv from environment.yml"
	@echo "make clean | distclean                           remove _build | and .venv too"

book: $(STAMP)  ## run stale notebooks, build the HTML
	@$(PY) -m doit $(if $(filter-out 1,$(CHAPTERS)),-n $(CHAPTERS)) profile=$(PROFILE) out="$(OUT)"
	@echo "The book: $(OUT)/html/index.html"

slides: book  ## slides of three sessions, from the pages of the book
	@$(PY) -m ecodiff book slides --out="$(OUT)"

pdf: book  ## the whole book in one PDF
	@$(PY) -m ecodiff book pdf --out="$(OUT)"

test: $(STAMP)
	$(PY) -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

measure: $(STAMP)
	$(PY) -m ecodiff study --model all

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mypy

pair: $(STAMP)
	$(PY) -m ecodiff book pair

ci:
	.ci/run

environment: $(STAMP)

# Installed once, and again when a pin changes. torch comes first, alone, so that its wheel can come from another index.
$(STAMP): environment.yml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, '$(PYTHON)' is older or missing. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python has no venv module. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@sed -n '/- pip:/,$$ s/^ *- //p' environment.yml | grep -v '^pip:' > $(VENV)/requirements.txt
	$(PY) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(VENV)/requirements.txt)"
	$(PY) -m pip install -r $(VENV)/requirements.txt
	@touch $(STAMP)

clean:  ## everything built; the environment stays
	rm -rf _build data/.cache

distclean: clean
	rm -rf $(VENV)
