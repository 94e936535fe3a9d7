# Everything goes into .venv (the tests' ComfyUI: .hosts) in this folder; a new machine needs python3 (3.10+), pip and make.
PYTHON ?= python3
BIN = .venv/bin
# uv where it is there, which takes a tenth of pip's time
UV := $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/pip install -q --disable-pip-version-check)
TORCH = torch==2.13.0
CPU_TORCH = https://download.pytorch.org/whl/cpu
# the oldest ComfyUI that is promised, and the newest that pip's index carries
HOSTS = 0.3.75 0.30.0
SUITES = server inside

.PHONY: demo test engine types test-host ablation setup clean $(HOSTS:%=host-%)

demo: .venv/ready
	$(BIN)/ppcl demo

# the engine on all cores, while the hosts are being set up; then the hosts, side by side, and the types: a server often
# waits for a job or a page, so that two processors have time for three
test:
	$(MAKE) --no-print-directory -j 3 engine $(HOSTS:%=host-%)
	$(MAKE) --no-print-directory -j 3 --output-sync=target $(foreach suite,$(SUITES),$(HOSTS:%=test-$(suite)-%)) types

# in the order of the folders: xdist's own order, files of many tests first, leaves the longest files to the end
engine: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --hypothesis-profile=ci --durations=20

types: .venv/ready
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# in ComfyUI's own process, and over HTTP against a server of ours: apart, so that they run side by side
IN_HOST = OMP_NUM_THREADS=1 COMFYUI=$(1) $(2) tests/comfyui/launch.py -m pytest tests/comfyui/$(3)
test-inside-%:
	$(call IN_HOST,.hosts/$*/ComfyUI,.hosts/$*/venv/bin/python,inside)
# what does not depend on the host (any_host) is run in the oldest alone
test-server-%:
	$(call IN_HOST,.hosts/$*/ComfyUI,.hosts/$*/venv/bin/python,server)$(if $(filter-out $(firstword $(HOSTS)),$*), -m "not any_host")

# any other ComfyUI: make test-host COMFYUI=/path/to/ComfyUI PYTHON=/its/environment/bin/python
test-host:
	$(foreach suite,$(SUITES),$(call IN_HOST,$(COMFYUI),$(PYTHON),$(suite)) &&) true

# PPCL against every baseline; goes on where it stopped
ablation: .venv/ready
	$(BIN)/python -m benchmarks.ablation

setup: .venv/ready

$(HOSTS:%=host-%): host-%:
	$(PYTHON) tests/comfyui/setup_host.py $*

# torch for the CPU: of pip's own index, else of torch's, else, as on a Mac, whatever there is
.venv/ready: pyproject.toml
	$(if $(UV),$(UV) venv -q --clear --seed --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
	$(INSTALL) $(TORCH)+cpu 2>/dev/null || $(INSTALL) --index-url $(CPU_TORCH) $(TORCH)+cpu 2>/dev/null || $(INSTALL) $(TORCH)
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .hosts runs
