PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Small models on few cores: one thread per process is faster, and nothing here waits for the network.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: ppo test test-all quality style bench

ppo: $(READY)
	$(BIN)/python recipes/ppo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --nbmake notebooks tests

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@for script in benchmarks/*.py; do \
		if [ -e "$$script" ]; then $(BIN)/python "$$script" || exit 1; else echo "There are no benchmarks yet."; fi; \
	done

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[dev,curation]" -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -e ".[deepspeed]" -c constraints.txt \
		|| echo "DeepSpeed could not be installed; everything but the ZeRO configurations works without it."
	@touch $@
