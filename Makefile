# Every target calls `setup`, which does nothing when the environment is already right.
PY := .venv/bin/python
TEST_ARGS ?=
# Tests that use one core run side by side on so many; tests/conftest.py says which run alone, after them.
WORKERS ?= 2
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
VALIDATION_ARGS ?=

.PHONY: help setup lint format test test-all test-unit test-engine test-fleet demo demo-epd bench bench-scheduler planner-validation gpu clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## create .venv and install everything this machine can run
	@./scripts/setup.sh

lint: setup ## ruff, mypy --strict, import contracts
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

format: setup ## rewrite the code as ruff formats it
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

test: lint ## lint, then all tests: unit, one real engine, fleets of real processes
	$(PY) -m pytest $(SIDE_BY_SIDE) tests $(TEST_ARGS)

test-all: lint ## lint, then all tests with the slow ones: the whole SwiftKV matrix, about half an hour on 2 cores
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "slow or not slow" tests $(TEST_ARGS)

test-unit: setup ## the quick tests
	$(PY) -m pytest $(SIDE_BY_SIDE) tests/unit $(TEST_ARGS)

test-engine: setup ## tests on one real engine
	$(PY) -m pytest $(SIDE_BY_SIDE) tests/engine $(TEST_ARGS)

test-fleet: setup ## tests on several real processes, with faults
	$(PY) -m pytest tests/fleet $(TEST_ARGS)

demo: setup ## 1 prefill + 1 decode + router on a real trace, proven equal to one engine
	$(PY) -m vllm_suite.cli.main demo $(if $(MODEL),--model $(MODEL)) $(if $(TRACE),--trace $(TRACE)) --json build/demo/report.json $(DEMO_ARGS)

demo-epd: setup ## 2 encoders + 1 prefill + 1 decode + router on pictures, proven equal to one engine
	$(PY) -m vllm_suite.cli.main demo-epd $(if $(MODEL),--model $(MODEL)) --json build/demo-epd/report.json $(DEMO_ARGS)

bench: setup ## every benchmark, JSON under build/bench
	@mkdir -p build/bench
	@for b in benchmarks/bench_*.py; do echo "== $$b"; $(PY) $$b --json build/bench/$$(basename $$b .py).json || exit 1; done

bench-scheduler: setup ## length-aware scheduling beside vLLM's own on recorded requests: hours on 2 cores, resumes
	$(PY) benchmarks/scheduler_replay.py --seeds 4 --json build/bench/scheduler_replay.json --plot build/bench/scheduler_replay.svg

planner-validation: setup ## the planner beside measurements and other tools, with verdicts; needs VLLM_SUITE_DATA
	.venv/eval/bin/python benchmarks/planner_validation.py --json build/bench/planner_validation.json $(VALIDATION_ARGS)

gpu: setup ## tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu tests $(TEST_ARGS)

clean: ## remove build output, keep the environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
