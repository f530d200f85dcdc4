# Two commands for a newcomer: `make demo` and `make test`. Python 3.10 or newer is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow docs check format clean

demo: $(STAMP)  ## train L2P-PGP and its unprojected twin on embedded digits, offline
	$(BIN)/pgp train demo --twin

test: $(STAMP)  ## the default test tier
	$(BIN)/python -m pytest -q -n auto --dist worksteal

slow: $(STAMP)  ## the tests that take minutes: every published command, several processes, a Ray cluster where Ray installs
	-$(BIN)/python -m pip install --quiet --editable '.[dev,ray]'
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

docs: $(STAMP)  ## the documentation site, in build/docs; every warning is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

check: $(STAMP)  ## everything CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs src tests benchmarks scripts
	$(BIN)/python -m pytest -q -n auto --dist worksteal
	$(BIN)/python scripts/check_wheel.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
