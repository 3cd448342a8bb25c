# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-versions timm-test lint docs publish clean

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest
	.ci/timm-test $(BIN)/python

timm-test: $(VENV)/.installed
	.ci/timm-test $(BIN)/python

# Does the gradient arrive, and does the monitor count, on other versions of torch? Each gets an environment of its own,
# $(VENV)-VERSION.
TORCH_VERSIONS ?= 2.8.0 2.11.0
GRADIENT_TESTS := tests/test_gradient_arrives.py tests/test_functional.py tests/test_layers.py tests/test_monitor.py \
	tests/kernels

test-versions: $(TORCH_VERSIONS:%=$(VENV)-%/.tested)

$(VENV)-%/.tested: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest $(GRADIENT_TESTS)

$(VENV)-%/.installed: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(VENV)-$*
	grep -E '^(timm|safetensors|huggingface-hub|accelerate|datasets)==' .ci/oldest.txt >$(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/pip install --quiet torch==$* torchvision --constraint $(VENV)-$*/constraints.txt --editable . \
		pytest pytest-xdist hypothesis numpy pillow
	touch $@

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
