"""The ComfyUI nodes of this pack. Nothing outside this folder imports ComfyUI."""

from __future__ import annotations

import logging
import re

from comfy_api.v0_0_2 import ComfyExtension, io

TESTED = ("0.3.75", "0.33.0")
"""the oldest and the newest ComfyUI that the tests ran on (docs/hosts.md)"""


class PPCLExtension(ComfyExtension):
    def __init__(self, nodes: list[type[io.ComfyNode]]):
        self.nodes = nodes

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return self.nodes


def extension() -> PPCLExtension:
    """Registers the folder models/ppcl and the pruned architectures with the host.

    If this ComfyUI differs from what the pack expects, nothing of it is changed: the nodes are
    listed, so that workflows keep their settings, and each says in one line why it does not run.
    Raises ImportError with that line if the nodes cannot even be listed.
    """
    try:
        from . import (
            host,
            # imported here: what these import may be missing in another ComfyUI
            paths,
        )
        from .catalogue import LOADING, MAKING
    except (ImportError, AttributeError) as error:
        raise ImportError(refused(str(error))) from error
    difference = host.register()
    if difference is None:
        paths.register()
        return PPCLExtension([*LOADING, *MAKING])
    logging.warning(refused(difference))
    return PPCLExtension([refusing(node, refused(difference)) for node in (*LOADING, *MAKING)])


def refused(difference: str) -> str:
    """Why the nodes do not run in this ComfyUI, in one line."""
    from comfyui_version import __version__

    if _numbers(__version__) < _numbers(TESTED[0]):
        return f"PPCL needs ComfyUI {TESTED[0]} or newer; this is {__version__} ({difference}): update ComfyUI"
    return (
        f"this version of PPCL was tested with ComfyUI {TESTED[0]} to {TESTED[1]}; this is {__version__} "
        f"({difference}): update ComfyUI-PPCL, or use a ComfyUI of those versions"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """0.3.75 -> (0, 3, 75); what follows the numbers does not count."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])


def refusing(node: type[io.ComfyNode], text: str) -> type[io.ComfyNode]:
    """The node with its widgets; instead of running it raises ValueError with this text."""

    def execute(cls, **_):
        raise ValueError(text)

    return type(node.__name__, (node,), {"execute": classmethod(execute)})
