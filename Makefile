# Needs Python 3.10 or later with its standard library, g++ and make; each target sets up what else it needs.
#
#   make demo     trains the example language model (examples/train_bytes.py)
#   make test     runs the tests, with both layouts of xFormers; compiles the CUDA sources, and needs no GPU for it
#   make cuda     runs the tests that have a variant for the GPU, on one
#   make sanitize runs every CUDA kernel under compute-sanitizer, which CUDA's toolkit has
#   make fuzz     draws random cases for much longer than `make test` does
#   make bench    measures against dense attention on this machine's CPU; benchmarks/gpu_*.py are run one by one
#   make lint     checks format and style; `make format` applies them
#   make clean    removes everything that these made

PYTHON ?= python3
VENV := .venv
MSLK := .venv-mslk

PY := $(abspath $(VENV)/bin/python)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# One architecture keeps the compilation short; a GPU of another one needs its own, such as 8.0 or 12.0.
TORCH_CUDA_ARCH_LIST ?= 9.0a
export TORCH_CUDA_ARCH_LIST

# Two test processes with one thread each are faster than one with two, and more would only wait for each other.
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2
# xFormers after 0.0.35, which is in no registry yet: our stand-in for it, found before the xFormers of the environment,
# and the mslk that it re-exports. mslk's own library needs a GPU build of PyTorch, and nothing here needs that library.
MSLK_LAYOUT := MSLK_PYTHON_ONLY=1 PYTHONPATH=$(CURDIR)/tests/layouts/mslk:$(CURDIR)/$(MSLK)

.PHONY: demo test cuda sanitize fuzz bench lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(PY) examples/train_bytes.py

test: $(VENV)/.built-cuda $(MSLK)/.installed
	$(TEST) tests
	$(MSLK_LAYOUT) $(TEST) $(wildcard tests/test_xformers*.py)

cuda: $(VENV)/.built-cuda
	$(PY) -m pytest -m cuda tests

# Only this project's kernels are watched, but where what PyTorch's have written counts. PyTorch's cache would hide
# accesses beyond a tensor. Waivers, for Hopper: initcheck does not see what bulk copies write to global memory, the sums
# of the backward and the output of the short forward; and, in the backward, racecheck takes what a warp has written, its
# lanes ordered by __syncwarp, and its first lane then passes on through an mbarrier, for a race (where all lanes arrive
# it sees none).
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool
OURS := --kernel-name kns=sparsek
sanitize: $(VENV)/.built-cuda
	$(SANITIZE) memcheck $(OURS) $(PY) tests/sanitize.py
	$(SANITIZE) synccheck $(OURS) $(PY) tests/sanitize.py
	$(SANITIZE) racecheck $(OURS) --kernel-name-exclude kns=sm908backward $(PY) tests/sanitize.py
	$(SANITIZE) initcheck $(PY) tests/sanitize.py --kernels sm80 simt
	$(SANITIZE) initcheck $(PY) tests/sanitize.py --kernels sm90 --forward --patterns soft window hard

fuzz: $(VENV)/.built
	HYPOTHESIS_PROFILE=fuzz $(TEST) tests

bench: $(VENV)/.built
	set -e; for script in $(wildcard benchmarks/cpu_*.py); do $(PY) $$script; done

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) $(MSLK) build *.egg-info xformers_sparsek/*.so

# xFormers comes without its dependencies: its wheel asks for a PyTorch that we pin ourselves, and its own library, which
# the published wheel builds for CUDA and for one version of PyTorch, is not needed.
$(VENV)/.installed: .ci/bootstrap.py .ci/requirements.txt
	$(PYTHON) .ci/bootstrap.py $(VENV)
	$(PIP) -r .ci/requirements.txt
	$(PIP) --no-deps xformers==0.0.35
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(CPP_SOURCES)
	XFORMERS_SPARSEK_CUDA=0 $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The CUDA compiler comes from PyPI where the machine has none.
$(VENV)/.built-cuda: $(VENV)/.installed .ci/nvcc.txt setup.py pyproject.toml $(CPP_SOURCES)
	test -x "$$CUDA_HOME/bin/nvcc" || command -v nvcc >/dev/null || $(PIP) --no-deps -r .ci/nvcc.txt
	XFORMERS_SPARSEK_CUDA=1 $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Without its library mslk is plain Python, so the wheel made for any one version of Python serves every other.
$(MSLK)/.installed: $(VENV)/.installed
	rm -rf $(MSLK)
	$(PIP) --no-deps --target $(MSLK) --python-version 3.11 --only-binary :all: --platform manylinux_2_28_x86_64 \
		mslk-cuda==1.1.0
	touch $@
