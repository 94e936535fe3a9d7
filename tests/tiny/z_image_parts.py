"""A plan for a tiny Z-Image: students with corrections, projections of both forms."""

from __future__ import annotations

from ppcl_engine.plan import Interval, Variant, WidthSite

from .trained_run import PlanParts

ALL = ("1-2", "4-5")
Z_IMAGE_PARTS = PlanParts(
    depth=(
        Interval(first=1, last=2, correction="affine"),
        Interval(first=4, last=5, correction="3"),
    ),
    width=(
        WidthSite(block=0, kind="ffn_joint"),
        WidthSite(block=1, kind="ffn_joint", fitted=("1",)),
        WidthSite(block=3, kind="ffn_joint", form="gated"),
    ),
    projections={
        ("0", "ffn_joint"): ("map",),
        ("1", "ffn_joint"): ("map",),
        ("1-2", "ffn_joint"): ("map",),
        ("3", "ffn_joint"): ("map",),
    },
    variants=(
        Variant(name="small", intervals=ALL),
        Variant(
            name="smallest",
            intervals=ALL,
            sites=("ffn_joint:0", "ffn_joint:1", "ffn_joint:3"),
        ),
    ),
)
