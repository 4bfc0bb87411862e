# `make demo` and `make test` set up .venv by themselves; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench gpu lint clean

demo: .venv/.core
	$(BIN)/dllm-fast demo

test: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

# The CPU round, within ten minutes on two idle cores; the first step looks whether they are, ARGS=--force measures anyway.
bench: .venv/.dev
	$(BIN)/python bench/nfe.py --model llada-steps --task steps --few --problems 40 --out runs/bench --peer published $(ARGS)
	$(BIN)/python bench/nfe.py --model cpu-768 --schedule uniform=16 --rounds 2 --out runs/bench --force
	$(BIN)/python -m bench.engine --quick
	$(BIN)/python bench/readme.py --check

# On a machine with a GPU, with the Python that has torch there; installs nothing. In slices: make gpu ARGS="--minutes 9".
gpu:
	PYTHONPATH=. $(PYTHON) bench/gpu.py $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/.core: requirements.txt pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -e '.[cli]'
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
