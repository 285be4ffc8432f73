# Each target works as the first command in a fresh clone: it makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin
# A process a core; a file's tests stay in one of them, so that its fixtures and its Flink cluster are made once
PARALLEL := -n logical --dist loadfile --no-loadscope-reorder

.PHONY: demo test check flink install clean

demo: .venv/demoed
	$(BIN)/diptych demo --output demo

test: .venv/tested
	$(BIN)/python -m pytest $(PARALLEL)

check: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -W error

# A Flink cluster on this machine, until Ctrl-C; prints the flags with which a job runs on it
flink: .venv/flinked
	$(BIN)/python deploy/flink_cluster.py

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/demoed: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

.venv/flinked: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[flink]"
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# For `pytest -m long tests/test_airflow.py`: its packages and Apache Beam's do not go together
.venv/airflow/installed: .venv/installed
	$(PYTHON) -m venv .venv/airflow
	.venv/airflow/bin/python -m pip install --quiet --requirement tests/airflow_requirements.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo
