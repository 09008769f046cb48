# `make train` and `make test` do all their own set-up: a virtual environment, then the job.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: train test test-all sanitize test-gpu gpu lint clean

train: $(VENV)/.ready
	$(BIN)/python -m tritonbnn.train $(ARGS)

# One thread a worker: tests are small, and two pools of threads on two cores fight.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-all: test sanitize

# The launchers in C again, compiled to stop at a wrong address and at undefined behaviour. Python
# is not, so the sanitizers' library must come before all others, with C++'s, whose exceptions it
# watches; what Python leaves is no leak.
sanitize: $(VENV)/.ready
	TRITONBNN_SANITIZE=1 OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) libstdc++.so.6" \
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -k "native and not native_build" $(ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Measures all that the README shows, in parts of minutes; the same command goes on.
gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.suite $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
