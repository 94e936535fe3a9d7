"""A plan for a tiny FLUX: students of double and of single blocks, projections of every kind."""

from __future__ import annotations

from ppcl_engine.plan import Interval, Variant, WidthSite

from .trained_run import PlanParts

FLUX_DEPTH = {"num_layers": 5, "num_single_layers": 6}
ALL = ("1-2", "6-7", "9-10")
FLUX_PARTS = PlanParts(
    depth=(
        Interval(first=1, last=2, correction="affine"),
        Interval(first=6, last=7, correction="3"),
        Interval(first=9, last=10, correction="none"),
    ),
    width=(
        WidthSite(block=0, kind="ffn_text"),
        WidthSite(block=1, kind="ffn_image", fitted=("1",)),
        WidthSite(block=3, kind="ffn_image", form="gated"),
        WidthSite(block=3, kind="text"),
        WidthSite(block=4, kind="text"),
        WidthSite(block=5, kind="ffn_joint", form="gated"),
        WidthSite(block=6, kind="ffn_joint", form="gated", fitted=("6",)),
    ),
    projections={
        ("0", "ffn_text"): ("map",),
        ("1", "ffn_image"): ("map",),
        ("1-2", "ffn_image"): ("map",),
        ("3", "ffn_image"): ("map",),
        ("3", "text"): ("map",),
        ("4", "text"): ("map", "step"),
        ("5", "ffn_joint"): ("map",),
        ("6", "ffn_joint"): ("map",),
        ("6-7", "ffn_joint"): ("map",),
    },
    variants=(
        Variant(name="small", intervals=ALL),
        Variant(
            name="smallest",
            intervals=ALL,
            sites=(
                "ffn_text:0",
                "ffn_image:1",
                "ffn_image:3",
                "text:3-4",
                "ffn_joint:5",
                "ffn_joint:6",
            ),
        ),
    ),
)
