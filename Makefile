# Every target sets up the environment that it needs in $(VENV); a second run finds it ready.
#
#   PYTHON     the interpreter that makes the environment, 3.11 or newer
#   PIP_FLAGS  options for every `pip install`, e.g. another package index. PyPI's torch for Linux brings
#              gigabytes of CUDA libraries; a machine without an NVIDIA GPU can do with the CPU build:
#              make demo PIP_FLAGS="--extra-index-url URL", URL being the CPU index on pytorch.org's install page
PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv

SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# Two workers, one thread each: more threads only get in each other's way on tiny models.
# A file's tests stay together, so that what a file sets up is set up once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
CODE := setup.py $(wildcard src training benchmarks docs tests)

# What `make test-versions` runs: the tests that themselves import one of Hugging Face's libraries or peft, those of the
# conversion's numbers, and of what setup.py declares.
HUGGING_FACE := diffusers|transformers|accelerate|huggingface_hub|peft|datasets
VERSIONS_TESTS = $(shell grep -lE '^ *(from|import) ($(HUGGING_FACE))' tests/test_*.py tests/training/test_*.py) \
	tests/test_golden.py tests/test_packaging.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-portable test-slow test-quantization test-browser test-upstream test-versions test-wheel \
	gpu check format pictures api clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

# Some of the emoji, with the sampler for few steps; README shows more of them than the demo draws.
EMOJI := "dog face" "cat face" fox lion panda koala frog "pig face" octopus crab turtle penguin owl butterfly \
	sunflower cactus mushroom strawberry pineapple watermelon "red apple" banana pizza hamburger doughnut "birthday cake" \
	rocket airplane balloon guitar "light bulb" "red heart"
MORE_EMOJI := "smiling face with sunglasses" "money mouth face" "face blowing a kiss" "alien monster" ghost crown trophy \
	"gem stone" ring "wrapped gift" bicycle tram house volcano rainbow "cloud with rain" snowflake star \
	"globe showing europe africa" "musical keyboard" violin "magnifying glass tilted left" "hundred points" "no entry" \
	"peace symbol" "four leaf clover" tulip cherries key umbrella "christmas tree" "artist palette"
DRAW_EMOJI = $(BIN)/transdiff generate --scheduler unipc --steps 10

demo: $(VENV)/.base ## draw emoji by name with the bundled model into emoji.png
	$(DRAW_EMOJI) $(EMOJI) --output emoji.png

test: $(VENV)/.test ## run the tests (minutes on two cores)
	$(PYTEST) -m "not slow and not browser"

# All tests of `make test`, as on other processors: once without vector instructions newer than SSE 4.2, once with AVX2,
# two threads and sums that round by their shapes, in random order. Another kind of processor ignores the limits.
SHUFFLE ?= $(shell date +%s)
test-portable: $(VENV)/.test ## run the tests as on other processors, with two threads, in random order
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		$(PYTEST) -m "not slow and not browser"
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_WAIT_POLICY=passive \
		$(PYTEST) -m "not slow and not browser" --threads 2 --vary-rounding 8 --shuffle $(SHUFFLE)

test-slow: $(VENV)/.test ## run the long tests
	$(PYTEST) -m slow

test-quantization: $(VENV)/.quantization ## run the tests that concern torchao, which is not in the environment
	PYTHONPATH=$(abspath $(VENV)/quantization) $(PYTEST) tests/test_quantization.py tests/test_quiet.py tests/test_readme.py

test-browser: $(VENV)/.browser ## drive the web demo in headless Chromium
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	echo "Chromium and its driver are needed: apt-get install --no-install-recommends chromium chromium-driver"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

test-upstream: $(VENV)/.quantization ## run diffusers' own test mixins on these classes: DIFFUSERS=path of a checkout of it
	@test -n "$(DIFFUSERS)" || { echo "Name a checkout of diffusers: make test-upstream DIFFUSERS=path"; exit 2; }
	$(INSTALL) requests-mock parameterized
	DIFFUSERS=$(abspath $(DIFFUSERS)) PYTHONPATH=$(abspath $(VENV)/quantization) $(PYTEST) -p no:warnings --timeout 900 tests/upstream

# One run with a time budget: GPU_FLAGS="--minutes 8 --reference ../TransDiff --output gpu". It installs what `make test`
# installs; on a machine without a network run `python -m benchmarks.gpu` itself (CONTRIBUTING.md).
GPU_FLAGS ?=
gpu: $(VENV)/.test ## measure everything on a GPU within minutes: GPU_FLAGS="--minutes 8 --reference ../TransDiff"
	$(BIN)/python -m benchmarks.gpu $(GPU_FLAGS)

# -W default: other versions deprecate other things, which is no fault of the tests; `make test` treats the warnings that
# come with constraints.txt as errors.
ENDS ?= lowest newest
test-versions: $(ENDS:%=$(VENV)-%/.versions) ## run tests with the lowest and the newest libraries
	for end in $(ENDS); do \
		python=$(VENV)-$$end/$(SCRIPTS)/python; \
		$$python -m pip list --disable-pip-version-check | grep -E '^(torch|numpy|pillow|safetensors|$(HUGGING_FACE)) '; \
		OMP_NUM_THREADS=1 $$python -m pytest -n 2 --dist loadfile -W default -m "not slow and not browser" \
			$(VERSIONS_TESTS) || exit; \
	done

# The sdist is built from the checkout and the wheel from the sdist, so that a file which the sdist lacks shows. An old
# egg-info would bring back files that are gone.
test-wheel: $(VENV)/.base ## build sdist and wheel, and use the wheel in an environment outside the checkout
	$(INSTALL) build
	rm -rf build/wheel src/*.egg-info
	PIP_CONSTRAINT=$(abspath constraints.txt) $(BIN)/python -m build --outdir build/wheel .
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv $$folder/venv && mkdir $$folder/work && \
	$$folder/venv/$(SCRIPTS)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
		build/wheel/*.whl && \
	cd $$folder/work && HF_HUB_OFFLINE=1 HF_HOME=$$folder/hub $$folder/venv/$(SCRIPTS)/python -I $(CURDIR)/tests/use_wheel.py

check: $(VENV)/.dev ## lint, formatting, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(wildcard src training benchmarks)

format: $(VENV)/.dev ## mend formatting and import order
	$(BIN)/ruff check --select I --fix $(CODE)
	$(BIN)/ruff format $(CODE)

pictures: $(VENV)/.browser ## draw the pictures of README, of the tour and of editing anew (needs Chromium too)
	$(DRAW_EMOJI) $(EMOJI) $(MORE_EMOJI) --output docs/images/emoji.png
	$(BIN)/transdiff generate --count 6 --output docs/images/digits.png
	$(BIN)/transdiff generate --count 6 --model digits-flow-map --num-inference-steps 1 \
		--output docs/images/digits_flow_map.png
	$(BIN)/python docs/run_page.py docs/tour.md --folder docs/images/tour
	test -d datasets/digits || $(BIN)/python -m training.digits.export --output datasets/digits
	$(BIN)/python -m training.digits.editing --model src/transdiff_pipelines/checkpoints/digits \
		--data datasets/digits --split test --seeds 0 --pictures docs/images
	$(BIN)/python tests/browser/screenshot.py docs/images/demo.png

api: $(VENV)/.base ## write the API reference, from the docstrings, to build/api
	$(INSTALL) -e ".[docs]"
	$(BIN)/pdoc --docformat google --output-directory build/api transdiff_pipelines

clean: ## remove the environments and everything that tools and the demo wrote
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache emoji.png

# The environment, in layers. A stamp is touched last, so an interrupted set-up starts again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, \
	this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.py constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV): the first time torch is downloaded, which can take minutes"
	$(INSTALL) torch
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(INSTALL) -e ".[train,test]"
	@touch $@

# torchao in a folder beside the packages of the environment: diffusers imports it wherever it is installed, and on
# import it complains of its CUDA kernels.
$(VENV)/.quantization: $(VENV)/.test
	$(INSTALL) --no-deps --upgrade --target $(VENV)/quantization torchao
	@touch $@

$(VENV)/.browser: $(VENV)/.test
	$(INSTALL) -e ".[browser]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e ".[train,dev]"
	@touch $@

# Environments of their own for both ends of setup.py's ranges; torch is the one of constraints.txt in both.
$(VENV)-%/.versions: setup.py constraints.txt tests/declared.py
	rm -rf $(VENV)-$*
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/$(SCRIPTS)/python tests/declared.py $* > $(VENV)-$*/constraints.txt
	$(VENV)-$*/$(SCRIPTS)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		-c $(VENV)-$*/constraints.txt -e ".[train]" pytest pytest-timeout pytest-xdist
	@touch $@
