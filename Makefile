# Two commands are enough: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export QUANTKIT_CACHE ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo check soak test test-avx2 docs lint types env clean

demo: $(VENV)/.ready
	$(BIN)/quantkit demo

# Two minutes, for every change: lint, types, the tests without a library, an engine or a broad table.
check: lint types
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not library and not engine and not broad and not slow and not gpu"

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

soak: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or gpu"

# The products of a CPU without AVX-512, on any CPU (saturating int8 sums are forced in the tests).
test-avx2: $(VENV)/.ready
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -q \
		tests/backends/test_float32_products.py tests/runtime/test_kernels.py \
		tests/runtime/test_kernel_choice.py tests/runtime/test_int8_sums.py

# The site of docs/ in site/; a broken link, anchor or reference fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

env: $(VENV)/.ready

# torch comes first and by its exact version: an open range would pull another build.
# What pip says goes to a log, which is shown when it fails.
$(VENV)/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantkit needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@echo "Making $(VENV): torch, the quantization libraries and what they need (usually 2 to 5 minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)" && \
	  $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'; \
	} > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]' \
	  > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .cache demo-output dist build site
