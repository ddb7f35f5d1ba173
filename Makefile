# `make run` and `make test` each do all the set-up that they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run reproduce test clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Four objectives, two seeds, POS tagging.
run: .venv/ready
	$(BIN)/python eval.py grid

# The paper's grid on the built-in language: three transformations, three tasks, three seeds.
reproduce: .venv/ready
	$(BIN)/python eval.py grid --out runs/reproduce --seeds 3 --tasks pos ner nli \
		--transforms transliterate transliterate+invert transliterate+syntax

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf .venv runs
