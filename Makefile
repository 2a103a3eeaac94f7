PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The second is for what builds the native kernels: the headers of the jaxlib that will run them.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: quickstart test test-slow sanitize lint clean .venv

quickstart: .venv            ## corpus, training, distillation, evaluation, report: the whole story
	$(RUN) -m scripts.quickstart

test: .venv                  ## everything that takes seconds
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv             ## what takes minutes
	$(RUN) -m pytest -m slow

sanitize: .venv              ## the native kernels' tests, with every access and overflow checked
	MOESAIC_SANITIZE=1 $(PINNED) $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/sanitized/library .
	PYTHONPATH=build/sanitized/library ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		$(RUN) -m pytest tests/kernels/test_native.py tests/kernels/test_native_attention.py \
		tests/kernels/test_quantized_matmul.py

lint: .venv                  ## style, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

.venv: $(VENV)/installed     ## only sets up

$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard kernels/native/src/*)
	$(PYTHON) -m venv $(VENV)
	$(PINNED) $(RUN) -m pip install --quiet --disable-pip-version-check ".[dev]"
	touch $@

clean:                       ## removes the environment and what tools left, never runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
