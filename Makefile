# Everything here needs Python 3.11 or newer and nothing else; `setup` runs by itself when it is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM := models/smollm2-135m-instruct
# Tests are many and small: one thread for each of them, as many at once as there are cores.
TEST_WORKERS ?= auto
PYTEST_ARGS ?=
# The peers have environments of their own; BENCH picks cases ("sft dpo"), BENCH_ARGS are for benchmarks.compare.
PEERS := .venv-peers
PEERS_PPO := .venv-peers-ppo
BENCH ?=
BENCH_ARGS ?=

.PHONY: help setup demo test test-long lint smollm bench clean

help:
	@echo "make demo    the whole road on the embedded corpus, PT to PPO, and a table of what each stage achieved"
	@echo "make test    all tests but those that start many processes"
	@echo "make test-long  these: about ten minutes more"
	@echo "make lint    ruff"
	@echo "make smollm  fetch a real 135M instruct model into $(SMOLLM)"
	@echo "make bench   side by side with TRL, and how cost grows; BENCH=\"sft dpo\" picks; needs the model and records"
	@echo "make setup   only install, into $(VENV)"
	@echo "make clean   remove caches and builds; runs, models and $(VENV) stay"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -e .[test]
	touch $@

demo: $(STAMP)
	$(BIN)/python -m lit_align pipeline --config configs/pipeline.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup -q -m "not long" $(PYTEST_ARGS)

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup -q -m long $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

smollm: $(SMOLLM)/config.json

$(SMOLLM)/config.json: | $(STAMP)
	$(BIN)/python -m lit_align.models.smollm --out $(SMOLLM)

bench: $(STAMP) $(SMOLLM)/config.json $(PEERS)/.installed $(PEERS_PPO)/.installed
	$(BIN)/python -m benchmarks.compare $(BENCH) --peers $(PEERS) --peers-ppo $(PEERS_PPO) $(BENCH_ARGS)

$(PEERS)/.installed: benchmarks/peers/requirements.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -r $<
	touch $@

$(PEERS_PPO)/.installed: benchmarks/peers/requirements-ppo.txt constraints.txt
	test -x $(PEERS_PPO)/bin/python || $(PYTHON) -m venv $(PEERS_PPO)
	$(PEERS_PPO)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -r $<
	touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find lit_align datamodules tests -name __pycache__ -type d -prune -exec rm -rf {} +
