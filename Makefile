# Everything goes into .venv (the tests' ComfyUI: .venv-host and .comfyui) in this folder; a new machine needs python3 (3.10+), pip and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-inside test-server setup host clean

demo: .venv/ready
	$(BIN)/ppcl demo

test: .venv/ready host
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
	$(MAKE) --no-print-directory -j 2 --output-sync=target test-inside test-server

# in ComfyUI's own process, and over HTTP against a server of ours: apart, so that they run side by side
test-inside test-server: test-%:
	OMP_NUM_THREADS=1 .venv-host/bin/python tests/comfyui/launch.py -m pytest tests/comfyui/$*

# PPCL against every baseline; goes on where it stopped
ablation: .venv/ready
	$(BIN)/python -m benchmarks.ablation

setup: .venv/ready

host:
	$(PYTHON) tests/comfyui/setup_host.py

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-host .comfyui runs
