"""All nodes of this pack, in the order of the menu."""

from __future__ import annotations

from .demo import DemoCaption, DemoDecode
from .edit import EditPlan
from .fold import FoldModel
from .jobs import CalibrateFromPrompts, Detect, DistillDepth, DistillWidth, Export, FineTune, Probe
from .load import LoadModel
from .record import RecordCalibration
from .sparsify import Sparsify
from .variant import ChooseVariant
from .view import Compare, Info, LoraReport
from .watch import CancelJob, PrepareRun, WatchJob

LOADING = [LoadModel, ChooseVariant, Info, LoraReport, Compare, DemoCaption, DemoDecode, FoldModel]
MAKING = [
    RecordCalibration,
    CalibrateFromPrompts,
    Probe,
    Detect,
    EditPlan,
    DistillDepth,
    DistillWidth,
    FineTune,
    Export,
    Sparsify,
    WatchJob,
    CancelJob,
    PrepareRun,
]
