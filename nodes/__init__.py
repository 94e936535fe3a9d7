"""The ComfyUI nodes of this pack. Nothing outside this folder imports ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import paths
from .demo import DemoCaption, DemoDecode
from .fold import FoldModel
from .host import qwen_image
from .load import LoadModel
from .variant import ChooseVariant
from .view import Compare, Info, LoraReport


class PPCLExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, ChooseVariant, Info, LoraReport, Compare, DemoCaption, DemoDecode, FoldModel]


def extension() -> PPCLExtension:
    """Registers the folder models/ppcl and the pruned architectures with the host."""
    paths.register()
    qwen_image.register()
    return PPCLExtension()
