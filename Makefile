# Two commands: `make demo` and `make test`. Both set up what they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Kernels that add up sums in other orders, as other processors do; MKL's COMPATIBLE differs most from Intel's own.
KERNELS := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem
NOT_NUMERIC := audio config corpus data fetching installed io judges judging moshi_memory moshi_speed one_writer \
    pieces provenance quality report sae_benchmark script
NUMERIC = $(filter-out $(foreach name,$(NOT_NUMERIC),%/test_$(name).py),$(shell find tests/unit -name 'test_*.py' | sort))

.PHONY: demo test test-kernels test-slow lint format clean

demo: $(READY)
	$(BIN)/snakemake --cores $(CORES)
	@echo "Done. Open results/demo/report/index.html"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile -m "not slow"

test-kernels: $(READY)
	$(KERNELS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile -m "not slow" $(NUMERIC)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/python tools/make_env.py --check
	$(BIN)/python tools/architecture.py --check
	$(BIN)/python tools/config_table.py --check

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile rules

$(READY): requirements.txt requirements-nodeps.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "error: Python 3.11 or 3.12 is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -r requirements.txt
	$(BIN)/python -m pip install --progress-bar off --no-deps -r requirements-nodeps.txt
	$(BIN)/python -m pip install --progress-bar off --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf results .snakemake
