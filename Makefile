# `make train` and `make test` do all their own set-up: a virtual environment, then the job.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# The newest releases that pip finds, and the oldest that pyproject.toml allows, each in an
# environment of its own.
NEWEST := .venv-newest
OLDEST := .venv-oldest

# Other people's programs, with our modules in them.
CLIENTS := .venv-clients

.PHONY: train test test-all test-newest test-oldest test-clients test-heavy fuzz kills sanitize test-gpu
.PHONY: gpu lint clean

train: $(VENV)/.ready
	$(BIN)/python -m tritonbnn.train $(ARGS)

# One thread a worker: tests are small, and two pools of threads on two cores fight. Where a test
# asks for more, a thread that waits gives its core away at once.
TESTING := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

test: $(VENV)/.ready
	$(TESTING) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	    -m "not compile and not bench and not slow" $(ARGS)

test-all: test test-heavy sanitize fuzz kills

# What kills and waits, what compiles for minutes by compilers that are not ours, and the
# benchmarks' own commands.
test-heavy: $(VENV)/.ready
	$(TESTING) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
	    -m "compile or bench or slow" $(ARGS)

# What a user's files may hold by accident, 2,000 of each kind.
fuzz: $(VENV)/.ready
	FUZZ_EXAMPLES=2000 $(TESTING) $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

# 25 runs of each of four optimisers, killed at random moments, and one at every write.
kills: $(VENV)/.ready
	KILLS=25 $(TESTING) $(BIN)/python -m pytest -n auto --maxprocesses 8 \
	    tests/test_resume.py -k "random_moment or death_at_every" $(ARGS)

test-newest: $(NEWEST)/.ready
	$(TESTING) $(NEWEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-oldest: $(OLDEST)/.ready
	$(TESTING) $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# Left out by "make test", which skips what is not installed.
test-clients: $(CLIENTS)/.ready
	$(TESTING) $(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

# The launchers in C again, compiled to stop at a wrong address and at undefined behaviour. Python
# is not, so the sanitizers' library must come before all others, with C++'s, whose exceptions it
# watches; what Python leaves is no leak.
sanitize: $(VENV)/.ready
	TRITONBNN_SANITIZE=1 OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) libstdc++.so.6" \
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -k "native and not native_build" $(ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Measures all that the README shows, in parts of minutes; the same command goes on. Where there is
# no environment yet, a python that has torch and Triton serves: a rented machine may lack a network.
gpu:
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	$$python -c 'import torch, triton' 2>/dev/null || \
	    { $(MAKE) $(VENV)/.ready && python=$(BIN)/python; } && \
	$$python -m benchmarks.suite $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Without constraints.txt, and without the limits of the extra "dev", which are of the tools alone.
$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	    -e . build hypothesis pytest pytest-xdist 'setuptools>=77'
	touch $@

$(OLDEST)/.ready: pyproject.toml oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c oldest.txt \
	    -e . build hypothesis pytest pytest-xdist 'setuptools>=77,<81'
	touch $@

$(CLIENTS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	    -e '.[clients]'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(CLIENTS) build dist *.egg-info
