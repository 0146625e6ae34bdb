PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo train-tiny test lint

demo: $(READY) ## two prompts, 120 s each, on the CPU or the GPU that is there
	$(BIN)/python inference_packforcing.py --config_path configs/tiny/demo.yaml --data_path prompts/tiny_demo.txt \
		--output_folder output/demo --seconds 120
	@echo "Look at output/demo/*.mp4"

train-tiny: $(READY) ## the small models from nothing, on a CPU, in hours; goes on where it was stopped
	bash scripts/train_tiny.sh

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	touch $@
