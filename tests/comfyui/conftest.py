"""The tests in `inside` and `server` run in ComfyUI's own environment: .venv-host/bin/python tests/comfyui/launch.py -m pytest tests/comfyui"""

from importlib.util import find_spec

collect_ignore = [] if find_spec("comfy") else ["inside", "server"]
