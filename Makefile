# `make test` and `make demo` set everything up by themselves, in a virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo space test slow lint docs dist clean

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/mtil.py --methods zero_shot moe_lora_merge lora_per_task slda moe_lora_fused \
		--steps 60 --batch_size 32 --lr 2e-2 --num_experts 20 --merge_every 20 --output_dir runs/demo

# the page of examples/space on what `make demo` left; any other adapter: make space ADAPTER=user/name
space: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[space]"
	$(BIN)/python examples/space/app.py $(if $(ADAPTER),--adapter $(ADAPTER))

# two processes with a thread each are faster than one with two, and do not fight over the cores
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the site, in build/docs/index.html; what Sphinx would warn of is an error
docs: .venv/docs
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -d build/doctrees docs build/docs

# what would be published, in dist
dist: .venv/ready
	$(BIN)/python -m pip install --quiet "build>=1.2" "twine>=6.1"
	rm -rf build/lib dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv runs build dist *.egg-info

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]" "ruff>=0.9"
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
