"""All nodes of this pack, in the order of the menu."""

from __future__ import annotations

from .make.adapt_lora import AdaptLora
from .make.calibrate_from_prompts import CalibrateFromPrompts
from .make.detect import Detect, Probe
from .make.distil import DistillDepth, DistillWidth, FineTune
from .make.edit_plan import EditPlan
from .make.export import Export
from .make.prune_model import PruneModel
from .make.record_calibration import RecordCalibration
from .make.sparsify import Sparsify
from .make.watch_and_cancel import CancelJob, PrepareRun, WatchJob
from .use.choose_variant import ChooseVariant
from .use.compare import Compare
from .use.demo import DemoCaption, DemoDecode
from .use.fold_model import FoldModel
from .use.info import Info
from .use.load_model import LoadModel
from .use.lora_report import LoraReport

LOADING = [LoadModel, ChooseVariant, Info, LoraReport, Compare, DemoCaption, DemoDecode, FoldModel]
MAKING = [
    PruneModel,
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
    AdaptLora,
    WatchJob,
    CancelJob,
    PrepareRun,
]
