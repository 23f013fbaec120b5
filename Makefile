# Everything runs in .venv, which is made and filled when something needs it and left alone while pyproject.toml
# stays as it is.

PYTHONS := python3.13 python3.12 python3.11 python3
BIN     := .venv/bin
DEV     := .venv/.installed-dev
DEMO    := .venv/.installed-demo
HINT    := echo "If it was hnswlib that failed: it is compiled here, with a C++ compiler and Python's headers;"; \
           echo "on Debian or Ubuntu: apt-get install g++ python3-dev"; exit 1

.PHONY: help demo test lint types unit integration differential conformance charts screenshots fuzz corpus chaos soak licences audit bench bench-proxy bench-index bench-sql bench-replicas bench-rolling bench-replay clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## show on real data what the proxy does, within five minutes; KEEP=1 leaves it running
	@$(BIN)/ruvector-proxy demo $(if $(KEEP),--keep)

test: lint types unit integration ## everything that a change must pass

lint: $(DEV) ## style, formatting and import rules
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== import rules"
	@$(BIN)/lint-imports

types: $(DEV) ## strict types
	@echo "== mypy"
	@$(BIN)/mypy

unit: $(DEV) ## unit and property tests, without a database
	@echo "== unit and property tests"
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/unit tests/property tests/fuzz

integration: $(DEV) ## tests against the embedded PostgreSQL
	@echo "== integration tests"
	@$(BIN)/python -m pytest -m 'not alone' -n auto --maxprocesses 4 --dist loadfile tests/integration tests/differential
	@echo "== integration tests that wait for a learner, two at a time"
	@$(BIN)/python -m pytest -m alone -n 2 --dist loadfile tests/integration || { \
	    echo "== those that failed beside another one, once more and by themselves"; \
	    $(BIN)/python -m pytest -m alone --last-failed --last-failed-no-failures none tests/integration; }

differential: $(DEV) ## 10,000 random pipelines, direct and through the proxy: nothing may differ
	@$(BIN)/python -m tests.differential --count $(or $(COUNT),10000) --seed $(or $(SEED),1)

conformance: $(DEV) ## third-party suites, direct and through the proxy; SUITE=psql runs one
	@$(BIN)/python -m tests.conformance $(SUITE)

charts: $(DEV) ## the Helm chart, rendered and checked, and the Dockerfile, linted
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[charts]'
	@$(BIN)/python -m pytest tests/unit/test_chart.py tests/unit/test_images.py tests/unit/test_monitoring.py

screenshots: $(DEV) ## the pictures in docs/dashboard.md, from a live run in headless Chromium
	@SCREENSHOTS=$(CURDIR)/docs/dashboard $(BIN)/python -m pytest tests/integration/test_dashboard.py

fuzz: $(DEV) ## coverage-guided fuzzing of every decoder and of the session, SECONDS=60 of CPU for each, into docs/fuzzing.md
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) --jobs $(or $(JOBS),1) --write docs/fuzzing.md

corpus: $(DEV) ## PostgreSQL's regression suite and 100,000 texts made of it, byte for byte through the session
	@$(BIN)/python -m tests.corpus

chaos: $(DEV) ## every fault under load, into docs/chaos.md; SEED=1 (ten minutes)
	@$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --write docs/chaos.md

soak: $(DEV) ## mixed load for SECONDS=3600, direct and proxied, into docs/soak.md: nothing may differ or grow
	@$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),1) --write docs/soak.md

licences: $(DEV) ## the licence of everything that is installed with the product, into docs/licences.md
	@$(BIN)/python -m tests.licences

audit: $(DEV) ## known vulnerabilities of what is installed (pip-audit, which asks PyPI); says what it could not look up
	@test -x .audit/bin/pip-audit || { python3 -m venv .audit && .audit/bin/pip install --disable-pip-version-check --quiet pip-audit; }
	@$(BIN)/python -m tests.audit .audit/bin/pip-audit

bench: $(DEV) ## what the proxy brings, and where it does not, on real data (25 minutes; ONLY=..., QUICK=1, DATA=...)
	@$(BIN)/python -m bench.suite $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

bench-proxy: $(DEV) ## what the hop costs, beside direct and pgbouncer (a quarter of an hour; QUICK=1, ONLY=..., DOCS=1)
	@$(BIN)/python -m bench.relay $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(DOCS),--docs)

bench-index: $(DEV) ## HNSW and IVFFlat on one column: which is chosen for which query, at what price
	@$(BIN)/python -m bench.index_choice

bench-replay: $(DEV) ## policies on recorded recall curves; the first run records them (10 minutes)
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m bench.replay
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m bench.replay --published

bench-sql: $(DEV) ## what the SQL interface costs statements that use none of it, measured and counted (15 minutes)
	@$(BIN)/python -m bench.sql_interface

bench-replicas: $(DEV) ## three replicas on one store: as good as one, leader killed, server restarted (20 minutes)
	@$(BIN)/python -m bench.replicas

bench-rolling: $(DEV) ## a rolling update: an older commit and today's program side by side on one store (3 minutes)
	@$(BIN)/python -m bench.rolling

clean: ## remove what was built, measured and installed here
	rm -rf .venv .audit .conformance .demo .replay .bench demo-results build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip reaches for the network only when the stamp is missing or older than pyproject.toml.
$(DEV): .venv/bin/python pyproject.toml
	@echo "== installing for development; the first time this takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]' || { $(HINT); }
	@touch $@ $(DEMO)

$(DEMO): .venv/bin/python pyproject.toml
	@echo "== installing; the first time this takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[demo]' || { $(HINT); }
	@touch $@

.venv/bin/python:
	@for python in $(PYTHONS); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "== creating .venv with $$python"; \
			exec "$$python" -m venv .venv; \
		fi; \
	done; \
	echo "Python 3.11 or newer with its venv module is needed and was not found; install it, on Debian or Ubuntu with:"; \
	echo "  apt-get install python3 python3-venv python3-dev g++"; \
	exit 1
