# `make compile` builds the demo, `make test` runs the tests; both first make .venv with the pinned versions.
# Needs Python 3.11 or later and make. Another interpreter: make PYTHON=python3.12 compile
PYTHON ?= python3
BIN := .venv/bin

CONSUMERS := $(basename $(notdir $(wildcard tests/consumers/requirements/*.txt)))

.PHONY: compile examples test test-all consumers lint format clean

compile: .venv/ready
	$(BIN)/compile pipeline.yaml

# Two models that are trained here, in build/examples, and not again while what they are made of stays the same.
examples: .venv/ready
	$(BIN)/python -m examples.sentiment
	$(BIN)/python -m examples.questions
	$(BIN)/compile examples/sentiment.yaml
	$(BIN)/compile examples/questions.yaml

# Registries' servers are killed in the middle of what they do: not beside tests that keep the machine busy. Work is stolen, so
# that what the tests of a file share is seldom made twice.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/ready .venv/servers/ready
	$(PYTEST) -m "not slow" --ignore tests/registries --ignore tests/consumers
	$(PYTEST) -m "not slow" tests/registries

test-all: .venv/ready .venv/servers/ready
	$(PYTEST) --ignore tests/registries --ignore tests/consumers
	$(PYTEST) tests/registries

# The tools that releases are made for, each in an environment of its own, which is made once; -rs says which is missing, and why.
consumers: .venv/ready $(CONSUMERS:%=.venv/consumers/%/ready)
	$(BIN)/python -m pytest -rs tests/consumers

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,examples,image,mlflow,s3,sign]'
	touch $@

# What the tests of registries talk to. No order with .venv/ready: that one makes .venv and leaves the rest of it alone.
.venv/servers/ready: tests/servers.sh
	sh tests/servers.sh $(@D)

.venv/consumers/%/ready: tests/consumers/requirements/%.txt tests/consumers/environment.sh
	sh tests/consumers/environment.sh $* $(PYTHON)

.venv/consumers/transformers-js/ready: tests/consumers/requirements/package-lock.json

clean:
	rm -rf .venv artifacts/*/ build/examples
