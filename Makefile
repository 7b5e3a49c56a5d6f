# `make compile` builds the demo, `make test` runs the tests; both first make .venv with the pinned versions.
# Needs Python 3.11 or later and make. Another interpreter: make PYTHON=python3.12 compile
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compile test test-all lint format clean

compile: .venv/ready
	$(BIN)/compile pipeline.yaml

# Servers are killed there in the middle of what they do: not beside other tests.
test: .venv/ready .venv/servers/ready
	$(BIN)/python -m pytest -n 2 -m "not slow" --ignore tests/registries
	$(BIN)/python -m pytest -m "not slow" tests/registries

test-all: .venv/ready .venv/servers/ready
	$(BIN)/python -m pytest -n 2 --ignore tests/registries
	$(BIN)/python -m pytest tests/registries

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,image,mlflow,s3,sign]'
	touch $@

# What the tests of registries talk to. No order with .venv/ready: that one makes .venv and leaves the rest of it alone.
.venv/servers/ready: tests/servers.sh
	sh tests/servers.sh $(@D)

clean:
	rm -rf .venv artifacts/*/
