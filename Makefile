# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test timm-test lint docs publish clean

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest
	.ci/timm-test $(BIN)/python

timm-test: $(VENV)/.installed
	.ci/timm-test $(BIN)/python

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# make publish ORG=NAME: every folder of hub_cards, each in one commit; HF_TOKEN or `hf auth login` gives the right to.
publish: $(VENV)/.installed
	@test -n "$(ORG)" || { echo "make publish needs ORG=NAME, an organisation or user of the Hub" >&2; exit 2; }
	for folder in $(wildcard hub_cards/*/); do \
		$(BIN)/timm-sugar publish $$folder --repo-id $(ORG)/$$(basename $$folder) || exit 1; \
	done

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[all,test]'
	touch $@

clean:
	rm -rf $(VENV) output build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
