"""Width projections distilled on the tiny teacher."""

from __future__ import annotations

from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DistillWidthConfig
from ppcl_engine.stages.prune.distill_width import distill_width

SITES = "text:2-3 ffn_image:0 ffn_image:4 ffn_text:1"


def distil(run: Run, teacher_file, **options) -> Run:
    options = {
        "rounds": 2,
        "updates": 6,
        "warm_up": 2,
        "learning_rate": 1e-3,
        "sites": SITES,
        **options,
    }
    distill_width(DistillWidthConfig(model=teacher_file, run=run.folder, device="cpu", **options))
    return run
