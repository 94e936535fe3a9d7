"""The ComfyUI nodes of this pack. Nothing outside this folder imports ComfyUI."""

from __future__ import annotations

import logging

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

    Where the host is not as known nothing of it is touched. The nodes are there, so that workflows
    keep their settings, and each says in one line why it does not run. Raises ImportError, in the
    same line, where even that cannot be had.
    """
    try:
        from . import (
            host,
            # here, not above: what these import may be missing in a ComfyUI that is not known
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
    from comfyui_version import __version__

    return (
        f"this version of PPCL was tested with ComfyUI {TESTED[0]} to {TESTED[1]}; this is {__version__}, where "
        f"{difference}: update ComfyUI-PPCL, or use a ComfyUI of those versions"
    )


def refusing(node: type[io.ComfyNode], text: str) -> type[io.ComfyNode]:
    """The node with its widgets, which says this instead of running."""

    def execute(cls, **_):
        raise ValueError(text)

    return type(node.__name__, (node,), {"execute": classmethod(execute)})
