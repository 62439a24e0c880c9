# Everything runs in .venv, which the first target that needs it makes: `make test` on a fresh clone is enough.
# Needed beforehand: Python 3.10 to 3.13 with its venv module, make, git. PYTHON names the interpreter that .venv is made
# with; to change it later, remove .venv.

PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
READY  := .venv/ready
NBDEV  := env -u IN_TEST $(BIN)
DEMO   := $(BIN)/ncp-vae run digits --preset cpu
# The pages come last and take longest: who has nothing left to do takes over half of another's tests.
SPREAD := --numprocesses auto --maxprocesses 4 --dist worksteal

# The models that run here are small: a second thread hardly helps them, and on a busy machine threads that wait for each other
# made a step ten times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test quick docs lab export readme notebook clean

help:
	@echo 'make demo                      train a small VAE and its noise contrastive prior, compare their samples'
	@echo 'make test [ARGS="-k walk"]     all tests; they run every notebook'
	@echo 'make quick [ARGS="-k walk"]    the tests that need less than half a second each, in a minute and a half'
	@echo 'make docs                      the site, in _docs/'
	@echo 'make lab                       JupyterLab in nbs/'
	@echo 'make export                    nbs/ -> ncp_vae/, and clean the notebooks'
	@echo 'make readme                    nbs/index.ipynb -> README.md'
	@echo 'make notebook NB=nbs/x.ipynb   export, run the notebook in place, clean it'
	@echo 'make clean                     remove what was built; .venv, runs/ and data/ stay'

demo: $(READY)
	$(DEMO)

test: $(READY)
	$(BIN)/python -m pytest tests $(SPREAD) $(ARGS)

quick: $(READY)
	$(BIN)/python -m pytest tests -m 'not slow' $(SPREAD) $(ARGS)

docs: $(READY)
	$(BIN)/python docs/build.py

lab: $(READY)
	$(BIN)/jupyter-lab --ServerApp.root_dir=nbs $(ARGS)

export: $(READY)
	$(NBDEV)/nbdev_export
	$(NBDEV)/nbdev_clean

readme: $(READY)
	$(BIN)/python docs/readme.py

notebook: export
	@test -f '$(NB)' || { echo 'Say which: make notebook NB=nbs/theory/01_walk.ipynb'; exit 2; }
	$(BIN)/python docs/execute.py $(NB)
	$(NBDEV)/nbdev_clean --fname $(NB)

clean:
	rm -rf _docs _site_src build dist .pytest_cache
	find nbs ncp_vae tests docs -name __pycache__ -prune -exec rm -rf {} +

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "Python 3.10 to 3.13 is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	@touch $@
