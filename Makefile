PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEBIAN := $(VENV)/debian

.PHONY: help demo serve test test-clients lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    launch the pipeline on the demo model and watch it answer"
	@echo "make serve   serve the demo model until Ctrl-C (MODEL=… for another)"
	@echo "make test    lint, type-check and run all tests"
	@echo "make test-clients   test with langchain, litellm, Prometheus … (installs them)"
	@echo "make clean   remove the virtual environment and caches"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a minute or two, once) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanovllm needs Python 3.11 or later: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -t 1 || export PIP_QUIET=1; $(BIN)/python -m pip install --disable-pip-version-check \
		-c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m nanovllm.launch.demo

serve: $(READY)
	@exec $(BIN)/nanovllm-launch $(MODEL)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests stay together, with their fixtures; tests/conftest.py has the long files go first.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-clients: $(READY) $(DEBIAN)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,clients]'
	PATH="$(CURDIR)/$(DEBIAN)/usr/bin:$$PATH" $(BIN)/python -m pytest \
		tests/clients tests/http/test_metrics.py

# Debian's Prometheus and promtool, unpacked: that needs no root. Without them their tests are skipped.
$(DEBIAN):
	@rm -rf $@.part && mkdir -p $@.part && cd $@.part && apt-get -qq download prometheus \
		&& dpkg -x prometheus_*.deb . && mv $(CURDIR)/$@.part $(CURDIR)/$@ \
		|| echo "Prometheus is not tested: apt-get cannot download its package here"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/node/node_modules \
		examples/node/package-lock.json
