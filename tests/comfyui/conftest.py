"""The tests in `inside` and `server` run in the environment of a ComfyUI, by `make test-host` or
`make test-inside-0.30.0`."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("comfy") else ["inside", "server"]
