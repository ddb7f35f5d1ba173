# `make run` and `make test` each do all the set-up that they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

run: .venv/ready
	$(BIN)/python eval.py grid

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf .venv runs
