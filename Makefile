# `make run` and `make test` each do all the set-up that they need.
PYTHON ?= python3
BIN := .venv/bin

PRESET ?= small

# The reduced grid of a CPU, in under an hour; the whole one of a GPU.
GRID_tiny := --seeds 1 --steps 4000
GRID_small := --seeds 3 --sentences 240000 --tasks pos ner nli qa --keep-every 1000 --jobs 2
GRID_paper := $(GRID_small)

.PHONY: run reproduce test test-faults fuzz clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

run: .venv/ready
	$(BIN)/python eval.py grid

reproduce: .venv/ready
	$(BIN)/python eval.py grid --preset $(PRESET) --out runs/$(PRESET)-grid $(GRID_$(PRESET)) \
		--transforms transliterate transliterate+invert transliterate+syntax transliterate+permute

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

test-faults: .venv/ready
	$(BIN)/python tests/faults.py

fuzz: .venv/ready
	$(BIN)/python tests/fuzz.py --count 100000

clean:
	rm -rf .venv runs
