# Both commands of the README do all the set-up by themselves: a virtual environment in .venv, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SUPPORTED := import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"weft needs Python 3.11, 3.12 or 3.13; this is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 ...")

.PHONY: demo test check bench clean

demo: .venv/.ready
	@$(BIN)/weft demo $(ARGS)

test: .venv/.ready-dev check
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: .venv/.ready-dev
	@$(BIN)/ruff check src tests bench examples
	@$(BIN)/mypy

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)'
	@test -x $(BIN)/python || { echo "making the virtual environment .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "installing weft"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.ready-dev: .venv/.ready
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache weft-demo
