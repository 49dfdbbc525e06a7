# Everything is set up in .venv from hashed requirements; the machine needs Python 3.11+ only.
PYTHON ?= python3
PORT ?= 8000
TRAFFIC ?= 1
TEST_PROCESSES ?= 2
HISTORY ?= 30
BIN := .venv/bin
# Type checking and lints need settings to load, not a database.
NO_DATABASE := DATABASE_URL=postgres://nobody@/none DJANGO_SECRET_KEY=- MSWAP_TOKEN_KEY=- \
	MSWAP_MASTER_KEYS=-

# Recorded answers and arrivals are no part of the project.
ROUTING_DATA ?= ../shared/data


.PHONY: run test lint bench bench-routing screenshots chromium requirements clean

run: .venv/run
	$(BIN)/python manage.py run --port $(PORT) --traffic $(TRAFFIC) --history $(HISTORY)

test: lint chromium
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

# The pages are tested in a real browser. Without one those tests are skipped (in CI they fail).
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing Chromium" \
		&& (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1; \
	then exit 0; fi; \
	echo "There is no Chromium and it can't be installed here: browser tests are skipped."

# docs/screenshots: every page, with 30 days of the demo's history.
screenshots: .venv/dev chromium
	MSWAP_SCREENSHOTS=1 $(BIN)/python -m pytest -q tests/browser/test_pages.py -k pictures

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(NO_DATABASE) $(BIN)/mypy .
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py check

bench: .venv/dev
	$(BIN)/python -m bench $(ARGS)

bench-routing: .venv/dev
	$(BIN)/python manage.py replay_routing $(ROUTING_DATA)/routing/scores.csv \
		--prices $(ROUTING_DATA)/routing/models.csv --picture docs/routing.svg \
		--arrivals $(ROUTING_DATA)/azure_trace/AzureLLMInferenceTrace_conv.csv $(ARGS)

# Pins with hashes, from requirements*.in. Not a lock format: those record download addresses.
requirements: .venv/dev
	$(BIN)/uv pip compile -q --system-certs --universal --generate-hashes --no-emit-index-url --no-header \
		--python-version 3.11 $(UPGRADE) -o requirements.txt requirements.in
	$(BIN)/uv pip compile -q --system-certs --universal --generate-hashes --no-emit-index-url --no-header \
		--python-version 3.11 $(UPGRADE) -o requirements-dev.txt requirements-dev.in

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.9

.venv/run: requirements.txt | .venv/bin/uv
	$(BIN)/uv pip install -q --system-certs --python $(BIN)/python --require-hashes -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run | .venv/bin/uv
	$(BIN)/uv pip install -q --system-certs --python $(BIN)/python --require-hashes -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .mswap staticfiles .pytest_cache .mypy_cache .ruff_cache .hypothesis
