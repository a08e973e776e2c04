PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEBIAN := $(VENV)/debian
CHROMIUM := $(VENV)/chromium
# Tests start hundreds of processes, which are to find the modules compiled.
unexport PYTHONDONTWRITEBYTECODE
# What needs Chromium, which test-clients unpacks.
IN_BROWSER := $(addprefix tests/page/,test_page.py test_mishaps.py test_pictures.py)
DEBIAN_LIB = $(CURDIR)/$(DEBIAN)/usr/lib/$(shell cc -print-multiarch 2>/dev/null)
# Those that are not installed. msgpack-c has had two names.
C_LIBRARIES = $(shell for msgpack in libmsgpack-c-dev libmsgpack-dev; do \
	apt-get -s install --no-install-recommends libzmq3-dev $$msgpack 2>/dev/null; done \
	| sed -n '/boost/d; s/^Inst \([^ ]*\).*/\1/p' | sort -u)

.PHONY: help demo serve test test-clients test-ray test-image chromium style lint image clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    launch the pipeline on the demo model and watch it answer"
	@echo "make serve   serve the demo model until Ctrl-C (MODEL=… for another)"
	@echo "make test    lint, type-check and run the tests"
	@echo "make test-clients   test with langchain, litellm, Prometheus, Chromium … (installs them)"
	@echo "make test-ray       test on a Ray cluster of local nodes (installs Ray)"
	@echo "make image   build a container image (VARIANT=cuda for GPUs; TORCH_CPU=INDEX: smaller)"
	@echo "make test-image  build the image, and test that it serves (where a builder runs)"
	@echo "make chromium  unpack Debian's Chromium into $(VENV), for the tests of the page"
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

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

# mypy runs beside the other tests (tests/lint). A file's tests stay together, with their fixtures;
# tests/conftest.py has the long files go first.
test: style
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-clients: $(READY) $(DEBIAN)
	@command -v chromium >/dev/null || $(MAKE) chromium
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,clients]'
	PATH="$(CURDIR)/$(DEBIAN)/usr/bin:$$PATH" CPATH="$(CURDIR)/$(DEBIAN)/usr/include" \
	LIBRARY_PATH="$(DEBIAN_LIB)" LD_LIBRARY_PATH="$(DEBIAN_LIB)" $(BIN)/python -m pytest \
		tests/clients tests/http/test_metrics.py tests/examples/test_c.py $(IN_BROWSER)

test-ray: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,ray]'
	$(BIN)/python -m pytest tests/ray

# Debian's Prometheus, promtool, and what the C client is built with, unpacked: that needs no root.
# Without them their tests are skipped.
$(DEBIAN):
	@rm -rf $@.part && mkdir -p $@.part && cd $@.part \
		&& apt-get -qq download prometheus $(C_LIBRARIES) \
		&& for package in *.deb; do dpkg -x "$$package" . || exit; done \
		&& mv $(CURDIR)/$@.part $(CURDIR)/$@ \
		|| echo "Prometheus and the C client are not tested: apt-get cannot download their packages"

VARIANT ?= cpu
# The first that works: docker's command may be there without its daemon.
BUILDER ?= $(shell for builder in podman docker buildah; do \
	$$builder info >/dev/null 2>&1 && echo $$builder && break; done)
# Such as --build-arg BASE=IMAGE.
BUILD_OPTIONS ?=

image:
	@test -n "$(BUILDER)" || { echo "make image: install podman, docker or buildah"; exit 1; }
	$(BUILDER) build -f deploy/container/Containerfile --build-arg VARIANT=$(VARIANT) \
		--build-arg TORCH_CPU=$(TORCH_CPU) $(BUILD_OPTIONS) -t nanovllm:$(VARIANT) .

# An image takes minutes to build: `make test` leaves its tests out.
test-image: $(READY)
	BUILDER="$(BUILDER)" BUILD_OPTIONS="$(BUILD_OPTIONS)" TORCH_CPU="$(TORCH_CPU)" \
		$(BIN)/python -m pytest tests/deploy/test_image.py

# Debian's browser, unpacked, with the libraries that are not installed.
chromium: $(CHROMIUM)

$(CHROMIUM):
	@mkdir -p $(VENV) && rm -rf $@.part && mkdir $@.part && (cd $@.part \
		&& apt-get -qq download $$(apt-get -s install --no-install-recommends chromium \
			fonts-dejavu-core | sed -n 's/^Inst \([^ ]*\).*/\1/p') \
		&& for package in *.deb; do dpkg -x "$$package" . && rm "$$package" || exit; done) \
		&& mv $@.part $@ || echo "The page is not tested: apt-get cannot download chromium"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/node/node_modules \
		examples/node/package-lock.json examples/c/complete
