# The two commands of the README: make demo, make test; the site: make docs. PYTHON names the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, and kept: to compile all takes longer than to download them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: demo test weekly docs bench campaigns foreign rehearsal clean

demo: $(VENV)/installed
	$(BIN)/lossguard demo

test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m "not weekly"

# What the tests leave out: the galleries' figures, a cluster of two workers, evolution strategies.
weekly: $(VENV)/tested
	$(BIN)/pytest -m weekly

docs: $(VENV)/documented
	$(BIN)/python site/pages.py
	$(BIN)/zensical build --strict --clean > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@! grep '^griffe: ' build/docs.log  # what docstrings lack
	@echo 'The site is in build/site: $(BIN)/python -m http.server --directory build/site'

bench: $(VENV)/tested
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only

# Random attacks: make campaigns OPTIONS='killed --minutes 5'
campaigns: $(VENV)/tested
	$(BIN)/python -m tests.campaigns $(OPTIONS)

# The optimizers of other libraries on docs/own_optimizer.md
FOREIGN := google/learned_optimization amoudgl/celo Belilovsky-Lab/pylo
CLONES := $(addprefix build/foreign/,$(FOREIGN))
empty :=
foreign: $(VENV)/tested $(CLONES)
	$(INSTALL) --group foreign
	PYTHONPATH=$(subst $(empty) $(empty),:,$(CLONES)) $(BIN)/pytest tests/test_foreign.py tests/torch/test_torch_foreign.py

$(CLONES):
	git clone --quiet --depth 1 https://github.com/$(@:build/foreign/%=%) $@

# What a release would install, with PYTHON: make rehearsal PYTHON=python3.13
rehearsal:
	rm -rf build/rehearsal
	$(PYTHON) -m venv build/rehearsal
	build/rehearsal/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	build/rehearsal/bin/python -m pip install --quiet --group build
	build/rehearsal/bin/python tests/rehearsal.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 to 3.13 is needed: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	@echo 'Installing JAX, Matplotlib and what else the demo needs: about 1 GB, in a minute or two'
	$(INSTALL) --editable '.[experiments]'
	touch $@

$(VENV)/tested: $(VENV)/bin/python pyproject.toml
	@echo 'Installing what the tests need, PyTorch included: several GB, in several minutes'
	$(INSTALL) --editable '.[all]' --group test
	touch $@ $(VENV)/installed

$(VENV)/documented: $(VENV)/bin/python pyproject.toml
	$(INSTALL) --group docs
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
