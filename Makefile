PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo test quick chaos bench lint docs build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## the example shop with a worker; PORT=5000 by default
	@exec $(BIN)/python -m example_app.demo

# Python may save compiled modules: otherwise, each of the many processes would compile them again.
test quick: export PYTHONDONTWRITEBYTECODE =

# More test processes than processors, because tests wait: many for other processes, some for a time.
PROCESSORS := $(shell getconf _NPROCESSORS_ONLN)
WORKERS = $(shell expr $(PROCESSORS) '*' 3)
QUICK_WORKERS = $(shell expr $(PROCESSORS) '*' 3 / 2)
TESTS = tests
test: $(STAMP) ## all tests, in parallel; TESTS='tests/unit -k words' for some
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

# The lint covers files changed since the last commit. Left out are tests that need a browser or a server, and
# slow ones: migrations, random orders of events, random requests to the API, the cost of pages, all
# minutes around clock changes, the example shop.
CHANGED = $$(git diff --name-only --diff-filter=d HEAD -- '*.py'; git ls-files --others --exclude-standard '*.py')
quick: $(STAMP) ## lint of changed files, unit tests, and integration tests on SQLite
	@files="$(CHANGED)"; [ -z "$$files" ] || { $(BIN)/ruff check $$files && $(BIN)/ruff format --check $$files; }
	$(BIN)/python -m pytest -q -n $(QUICK_WORKERS) --dist worksteal \
		-m 'not browser and not acceptance and not slow' -k 'not postgresql and not mysql' \
		tests/unit tests/integration

SECONDS = 300
SEED =
DATABASE = sqlite
chaos: $(STAMP) ## workers killed and stalled, database outages; SECONDS=300 SEED=7 DATABASE=sqlite|postgresql|mysql|<url>
	@$(BIN)/python -m tests.chaos --seconds '$(SECONDS)' $(if $(SEED),--seed '$(SEED)') \
		--database '$(DATABASE)'

# The other queues are installed in a separate environment, because the tests do not need them.
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/installed
OPTIONS = --write
bench: $(BENCH_STAMP) ## compare with other queues, write to docs/; OPTIONS='--quick' or '--help' instead
	@$(BENCH_VENV)/bin/python -m benchmarks $(OPTIONS)

lint: $(STAMP) ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict flask_bgjobs
	$(BIN)/lint-imports

docs: $(STAMP) ## the documentation, in docs/_build/html
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

build: $(STAMP) ## sdist and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## remove the output of these targets, including the demo's data
	rm -rf $(VENV) $(BENCH_VENV) build dist docs/_build instance *.egg-info .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): EXTRAS := dev,example
$(BENCH_STAMP): EXTRAS := bench
$(STAMP) $(BENCH_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is required: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
