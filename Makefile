# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench ci dist clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[tests,docs]'
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/digits.py

test: .venv/.installed
	$(BIN)/python -m pytest -n 2

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: .venv/.installed
	$(BIN)/python benchmarks/cost.py

ci:
	.ci/run

dist:
	.ci/dist

clean:
	rm -rf .venv build dist docs/_build runs *.egg-info
