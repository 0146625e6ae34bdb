PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
modern = $(shell $(1) -c "import sys; print(sys.version_info >= (3, 11))" 2>/dev/null)

.PHONY: demo train-tiny test lint

demo: $(READY) ## a story of five shots and a single one, 120 s each, on the CPU or the GPU that is there
	$(BIN)/python inference_packforcing.py --config_path configs/tiny/demo.yaml --data_path prompts/tiny_story.json \
		--output_folder output/demo
	@echo "Look at output/demo/*.mp4"

train-tiny: $(READY) ## the small models from nothing, on a CPU, in hours; goes on where it was stopped
	bash scripts/train_tiny.sh

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .

ifneq ($(call modern,$(BIN)/python),True)
.PHONY: $(READY) # there is no environment yet, or a stale one: its Python is gone, or an old one
endif

$(READY): requirements.txt
	$(if $(filter True,$(call modern,$(PYTHON))),,$(error $(PYTHON) is not Python 3.11 or newer: make PYTHON=python3.11))
	$(if $(filter True,$(call modern,$(BIN)/python)),,$(PYTHON) -m venv --clear .venv)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	touch $@
