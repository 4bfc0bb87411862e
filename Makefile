# `make demo` and `make test` set up .venv first, with the interpreter PYTHON.
# SYSTEM=1 uses that interpreter's torch (of a CUDA image or a cluster's module) and downloads no other.
PYTHON ?= python3
BIN := .venv/bin
PINS := $(if $(SYSTEM),,-r requirements.txt)

.PHONY: demo test test-all bench gpu lint clean

demo: .venv/.core
	$(BIN)/dllm-fast demo

# The suite, then the CPU tests and a quick bench with older processors' instructions: at most 45 minutes on two cores.
test: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python tests/all.py test

# Other seeds, instruction sets and environments, for hours. ARGS=--list lists the pieces, ARGS="newest" runs one.
test-all: .venv/.dev
	$(BIN)/python tests/all.py $(ARGS)

# CPU benches, in ten minutes on two idle cores. Refuses to measure on a busy machine unless ARGS=--force.
bench: .venv/.dev
	$(BIN)/python -m bench.generation.nfe --model llada-steps --task steps --few --problems 40 --out runs/bench --peer published $(ARGS)
	$(BIN)/python -m bench.generation.nfe --model cpu-768 --schedule uniform=16 --rounds 2 --out runs/bench --force
	$(BIN)/python -m bench.generation.engine --quick
	$(BIN)/python -m bench.report.results --check

# For a machine with a GPU, with its Python that has torch; installs nothing. In slices: make gpu ARGS="--minutes 9".
gpu:
	PYTHONPATH=. $(PYTHON) -m bench.gpu $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/mypy

.venv/.core: requirements.txt pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv .venv
	$(if $(SYSTEM),$(PYTHON) -c "import torch; print(*__import__('site').getsitepackages(), sep='\n')" \
		> "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/system.pth")
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PINS) -e '.[cli]'
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PINS) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
