# Everything a checkout needs. A target sets up what it depends on; `make` alone lists the targets.
#
#   PYTHON=python3.13   interpreter for the virtual environment (3.11 or newer)
#   VENV=.venv-3.13     where that environment lives; several can share a checkout
#   ARGS="-m 4G"        more arguments for run, test and bench

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FUZZER := "atheris>=3"
PACKAGES := python3 python3-venv python3-dev gcc binutils libc6-dev linux-libc-dev

# Start-up is inside the pause of a live update, so bytecode must be cached whatever the caller's
# environment says (Python takes the empty string as unset).
export PYTHONDONTWRITEBYTECODE =
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# With pip's growing pauses, half a minute without an answer; its own five are over after 8 s.
export PIP_RETRIES ?= 7
MAKEFLAGS += --no-print-directory

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: run test test-linux needs check lint types fix bench soak fuzz build venv guests firmware wheel clean

run: build  ## boot the built-in guest, console and monitor on this terminal (Ctrl-a h helps)
	@PATH="$(abspath $(BIN)):$$PATH" exec pyvmm run -serial mon:stdio $(ARGS)

test: build needs  ## lint, types and all tests, with the real /dev/kvm where there is one
	@failed=0; \
	$(MAKE) lint || failed=1; \
	$(MAKE) types || failed=1; \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(ARGS) || failed=1; \
	exit $$failed

# At every run, since it takes no longer than to see whether it is necessary.
needs: venv  ## install the Debian packages that tests use, or name them
	@$(BIN)/python tests/harness/needs.py

test-linux: build  ## the tests with a Linux guest alone; where KVM cannot run it, in an emulated machine
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/linux $(ARGS)

check: build lint types  ## lint, types and unit tests; changes nothing
	@$(BIN)/python -m pytest -m "not slow" tests/unit $(ARGS)

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: venv
	@$(BIN)/mypy

fix: venv  ## format and repair what ruff can repair
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: build  ## measure the pause, start-up and memory; print a table and write JSON
	@PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

soak: build  ## a thousand updates in a row: the pause's percentiles, and what must stay constant
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/soak.py $(ARGS)

fuzz: build  ## give whatever reads what others wrote inputs that no one would write; five minutes
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install -q $(FUZZER)
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

build: venv guests firmware  ## set everything up without running it

venv: $(READY)  ## the virtual environment, with pyvmm installed from this checkout

guests firmware: | $(READY)
	@$(MAKE) -s -C $@
guests:  ## the built-in guest kernel
firmware:  ## the built-in ROM

wheel: venv  ## source archive and wheel, with extension, guest and ROM inside, in dist/
	@$(BIN)/python -m build -o dist .

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info pyvmm/_native/_kvm.c pyvmm/_native/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pyvmm tests -name __pycache__ -prune -exec rm -rf {} +
	$(MAKE) -s -C guests clean
	$(MAKE) -s -C firmware clean

# setuptools is taken out again because the .pth file that it installs costs every start 2 ms;
# builds get their own in isolation.
$(READY): pyproject.toml pyvmm/_native/bin/pyvmm pyvmm/_native/build.py pyvmm/_native/linux.cdef \
		$(filter-out %/_kvm.c,$(wildcard pyvmm/_native/*.[ch])) | $(BIN)/python
	@echo "installing pyvmm into $(VENV)"
	@rm -f pyvmm/_native/_kvm.*.so
	@$(BIN)/python -m pip install -q -e '.[test]' || { \
		echo "if that is for want of a network: put the packages that pyproject.toml names into a" \
			"folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER" >&2; \
		exit 1; \
	}
	@$(BIN)/python -m pip uninstall -q -y setuptools 2>/dev/null
	@$(BIN)/python -m compileall -q pyvmm
	@touch $@

$(BIN)/python:
	@$(prerequisites)
	@$(PYTHON) -m venv --clear $(VENV)

# Debian's packages are installed where that is possible and otherwise named. Look-ups of a mirror
# fail now and then; a list that is not to be had is an error to apt only if it is told so.
define prerequisites
lacking() { \
	for command in $(PYTHON) gcc ld; do \
		command -v $$command >/dev/null || echo $$command; \
	done; \
	for header in stdio.h linux/kvm.h; do \
		gcc -E -x c -include $$header /dev/null >/dev/null 2>&1 || echo $$header; \
	done; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || echo ensurepip; \
	$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' \
		2>/dev/null || echo Python.h; \
}; \
apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$$@" >/dev/null; }; \
install() { apt install -y --no-install-recommends $(PACKAGES); }; \
if [ -n "$$(lacking)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing $(PACKAGES)"; \
	for pause in 0 2 10; do \
		sleep $$pause; \
		apt -o APT::Update::Error-Mode=any update && install && break; \
	done || install || true; \
fi; \
lack=$$(lacking | tr '\n' ' '); \
if [ -n "$$lack" ]; then \
	echo "missing: $$lack" >&2; \
	echo "as root: apt-get install $(PACKAGES)" >&2; \
	exit 1; \
fi; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "$(PYTHON) is older than 3.11: name a newer one, as in make PYTHON=python3.13" >&2; \
	exit 1; \
}
endef
