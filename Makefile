# The two commands of the README: `make demo` and `make test`. Both need Python >= 3.11 only.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test check bench clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready  ## train MiniLM int4 on the shipped tickets, forward passes only
	$(BIN)/zotune train --config examples/demo.yaml

test: .venv/ready  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

check: .venv/ready  ## lint, types, floors, docs examples
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy zotune
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules zotune README.md CONTRIBUTING.md --doctest-glob='*.md'

bench: .venv/ready  ## every benchmark, results under benchmarks/results/
	for name in step noise "memory --steps 5000" roofline; do \
		$(BIN)/zotune bench $$name --threads $(OMP_NUM_THREADS) || exit 1; done

clean:
	rm -rf .venv build dist runs *.egg-info
