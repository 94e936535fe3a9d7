"""The ComfyUI nodes of this pack. Nothing outside this folder imports ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import paths
from .demo import DemoCaption, DemoDecode
from .edit import EditPlan
from .fold import FoldModel
from .host import register
from .jobs import CalibrateFromPrompts, Detect, DistillDepth, DistillWidth, Export, FineTune, Probe
from .load import LoadModel
from .record import RecordCalibration
from .sparsify import Sparsify
from .variant import ChooseVariant
from .view import Compare, Info, LoraReport
from .watch import CancelJob, PrepareRun, WatchJob

LOADING = [LoadModel, ChooseVariant, Info, LoraReport, Compare, DemoCaption, DemoDecode, FoldModel]
MAKING = [
    RecordCalibration, CalibrateFromPrompts, Probe, Detect, EditPlan, DistillDepth, DistillWidth, FineTune, Export,
    Sparsify, WatchJob, CancelJob, PrepareRun,
]  # fmt: skip


class PPCLExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*LOADING, *MAKING]


def extension() -> PPCLExtension:
    """Registers the folder models/ppcl and the pruned architectures with the host."""
    paths.register()
    register()
    return PPCLExtension()
