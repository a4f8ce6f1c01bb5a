# make demo | test | test-triton | test-cuda | compile-check | matrix | sanitize | lint | types | docs | bench
#      gpu-check | gpu-baselines | rehearse-gpu | clean
#
# Everything runs in $(VENV), made on first use and kept: a stamp file in it says what is installed.

PYTHON ?= python3
VENV   ?= .venv
# installed only where the environment has no torch yet; for another build of it, e.g.
# make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.*

# make demo MODEL=microsoft/Florence-2-base IMAGE=photo.jpg OUT=folder
MODEL  ?=
IMAGE  ?=
OUT    ?=
ARGS   ?=
# which of the tests that take turns (marker turns) run; all of them: pytest without --turn
TURN   ?= 0

PY  := $(VENV)/bin/python
RUN := $(PY) -m

.PHONY: demo test test-triton test-cuda compile-check matrix sanitize lint types docs bench gpu-check gpu-baselines rehearse-gpu build clean
.DEFAULT_GOAL := demo

demo: build
	$(RUN) fastvlm demo $(if $(MODEL),--model "$(MODEL)") $(if $(IMAGE),--image "$(IMAGE)") \
	  $(if $(OUT),--out "$(OUT)") $(ARGS)

test: $(VENV)/.dev $(VENV)/.emulator build
	OMP_WAIT_POLICY=PASSIVE $(RUN) pytest -n auto --maxprocesses 4 --turn $(TURN) $(ARGS)

# every case of the Triton kernels, executed by an emulator, without a GPU
test-triton: $(VENV)/.dev $(VENV)/.emulator build
	$(RUN) pytest -m triton --triton full -n auto $(ARGS)

# every Triton kernel compiled for several GPUs, without one, and its counts compared with those kept
# (of sm_86 and sm_89 none are, and what is wrong with them alone counts)
compile-check: $(VENV)/.emulator
	$(RUN) fastvlm compile $(if $(filter sm_86 sm_89,$(ARGS)),,--check benchmarks/results/triton-compiled.json) $(ARGS)

# the CUDA kernels without a GPU: compiled by nvcc, their counts compared with those kept, and every
# case and planted bug executed by an emulator, which g++ compiles
test-cuda: $(VENV)/.dev $(VENV)/.emulator
	@for tool in nvcc g++; do command -v $$tool >/dev/null \
	  || { echo "make test-cuda: no $$tool, so nothing was checked"; exit 1; }; done
	$(RUN) fastvlm compile --cuda --check benchmarks/results/cuda-compiled.json
	$(RUN) pytest tests/ops tests/test_cuda_*.py -m "cuda and not gpu" --cuda full -n auto $(ARGS)

# other versions of transformers, torch and Python, each in an environment of its own that is kept:
# make matrix ROWS="transformers-5.17.0 python-3.12" PARTS="names families"
ROWS ?=
PARTS ?=
matrix: build
	$(PY) tests/matrix.py $(ROWS) $(if $(PARTS),--parts $(PARTS)) $(ARGS)

# the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (g++); Python itself is not
# built for them, so leaks are not looked for and its own interpreter is preloaded with the runtime
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
sanitize: $(VENV)/.dev
	FASTVLM_CXXFLAGS="$(SANITIZERS)" CXX=g++ \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FASTVLM_EXPECT_SANITIZERS=1 \
	  $(RUN) pytest tests/test_cpu_kernels.py tests/ops -m "not slow and not triton and not cuda" -k "not compile" --capture=sys $(ARGS)

lint: $(VENV)/.dev
	$(RUN) ruff check
	$(RUN) ruff format --check
	@if command -v clang-format >/dev/null; then \
	  find csrc tests/cuda/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs clang-format --dry-run --Werror; \
	else echo "clang-format is not installed: csrc is not checked"; fi

types: $(VENV)/.dev
	$(RUN) mypy

# the site, in site/; a warning is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

bench: $(VENV)/.dev build
	$(RUN) fastvlm bench
	$(RUN) benchmarks.end_to_end
	$(RUN) benchmarks.decoding
	$(RUN) benchmarks.decoding --loop
	$(RUN) benchmarks.decoding_engines
	$(RUN) benchmarks.training
	$(RUN) benchmarks.limits
	$(RUN) benchmarks.report

# as the machine is: nothing is installed, here or by it
gpu-check: OUT := $(or $(OUT),benchmarks/results/gpu)
gpu-check:
	$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu_check "$(OUT)" $(ARGS)

# The same without a GPU, up to the first kernel, in an environment of the versions of a machine that
# was seen: transformers 5.17, triton 3.6, and nothing of ours. Its torch, 2.11, has no build without
# CUDA on PyPI (2.5 GB of libraries): TORCH here unless MACHINE=python3 says which python3 to take.
MACHINE :=
rehearse-gpu: $(if $(MACHINE),,$(VENV)-machine/.ready)
	.ci/gpu-machine $(or $(MACHINE),$(VENV)-machine/bin/python)

$(VENV)-machine/.ready:
	$(PYTHON) -m venv $(VENV)-machine
	$(VENV)-machine/bin/python -m pip install $(TORCH)
	$(VENV)-machine/bin/python -m pip install transformers==5.17.0 numpy pillow scikit-image \
	  tabulate psutil ninja pytest pytest-xdist pytest-benchmark
	$(VENV)-machine/bin/python -m pip install --no-deps triton==3.6.0
	@touch $@

# compiles only what is not in the cache yet; a machine without a compiler goes on without kernels
build: $(VENV)/.demo
	@$(RUN) fastvlm build || echo "make: going on without the CPU kernels; plain PyTorch serves"

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(PY)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml $(wildcard setup.py) | $(VENV)/.torch
	$(PY) -m pip install "$(TRANSFORMERS)" -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard setup.py) | $(VENV)/.torch
	$(PY) -m pip install "$(TRANSFORMERS)" -e ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(VENV)/.torch
	$(PY) -m pip install -e ".[docs]"
	@touch $@

# What the kernels are measured against on a GPU, without what they would install beside it: torch
# and triton are there. One that cannot be had is named in the results; flash-attn, hours of nvcc
# where there is no wheel, is one where it is installed already.
gpu-baselines: $(VENV)/.dev
	for package in liger-kernel cut-cross-entropy; do \
	  $(PY) -m pip install --no-deps $$package || echo "make: $$package is left out"; done

# Triton and its emulator; neither asks for a GPU. ttsem runs on older Pythons than it declares
$(VENV)/.emulator: | $(VENV)/.torch
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --no-deps triton==3.8.0
	$(PY) -m pip install --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
