# Two commands do everything on a fresh machine: make demo, make test.
.PHONY: demo test paper check clean

demo:  # installs, fetches the data, improves a LawBench target, opens the sealed test
	@scripts/setup base
	@scripts/data lawbench
	@scripts/demo

test:  # installs what the tests need, fetches the data of all tasks, runs the tests
	@scripts/setup dev
	@scripts/data
	@.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 30

paper:  # the tables of the paper, cell by cell: dvc repro
	@scripts/setup paper
	@scripts/paper

check:  # what CI and pre-commit check besides the tests
	@scripts/setup dev
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@.venv/bin/codespell

clean:  # removes the environment and the runs, keeps the data
	rm -rf .venv runs mlflow.db* mlartifacts
