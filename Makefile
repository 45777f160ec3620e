# make venv        the virtual environment with everything the trainer and its tests need
# make demo        teach the small Wan a new style, and look at it: five minutes on two cores
# make test        checks and tests, ten minutes on two cores
# make check       only the checks: lint, format, types; a minute the first time, seconds later
# make test-slow   proofs at full size
# make crash-check proof that a killed run goes on as if nothing had happened
# make families-check  every family of Wan from clips to a converted LoRA; at most half an hour on two cores
# make gpu-bench   what is left of the measurements on a GPU, in parts of at most eight minutes, and their table
# make nano-check  proofs that training teaches, on the small Wan
# make nano-check-families  the same for image-to-video and for two experts; continues where it was interrupted
# make nano-check-distill  what few steps keep on the small Wans; on two cores, continues where it was interrupted
# make nano-check-memory  how many steps optimizers need on the small Wan; about two hours on one free core, resumable
# make learning    what LoRAs learn on quantised bases of the small Wan; about two hours on one free core, resumable

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-slow crash-check families-check nano-check nano-check-families nano-check-distill nano-check-memory learning gpu-bench check clean

venv: $(VENV)/.complete

$(VENV)/.complete: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 venv")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, each with a file of tests at a time and one thread. Waiting threads that spin slow other processes down.
test: check
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not nano and not nano_families and not nano_distill and not crash and not families"

test-slow: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

crash-check: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m crash

families-check: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m families

nano-check: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m nano -s

nano-check-families: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m nano_families -s

# Two processes, each with an experiment at a time and one thread.
nano-check-distill: venv
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal -m nano_distill

nano-check-memory: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.optimizers

learning: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.learning

gpu-bench: venv
	$(BIN)/python benchmarks/gpu_check.py

demo: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m nano.demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
