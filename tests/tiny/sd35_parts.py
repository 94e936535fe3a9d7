"""A plan for a tiny SD3.5: students of blocks that attend twice to the image and of others,
projections of every kind, the last block's too."""

from __future__ import annotations

from ppcl_engine.plan import Interval, Variant, WidthSite

from .trained_run import PlanParts

SD35_SIZES = {
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 8,
    "attention_head_dim": 64,
    "caption_projection_dim": 128,
}
"""Heads as wide as the host takes for granted, and not as many of them as blocks"""
ALL = ("1-3", "4-5")
SD35_PARTS = PlanParts(
    depth=(
        Interval(first=1, last=3, correction="affine"),
        Interval(first=4, last=5, correction="none"),
    ),
    width=(
        WidthSite(block=0, kind="ffn_text"),
        WidthSite(block=1, kind="ffn_image", fitted=("1",)),
        WidthSite(block=0, kind="ffn_image", form="gated"),
        WidthSite(block=4, kind="text", fitted=("4",)),
        WidthSite(block=5, kind="text", fitted=("5",)),
        WidthSite(block=6, kind="ffn_image", form="gated"),
        WidthSite(block=7, kind="ffn_image"),
        WidthSite(block=7, kind="text"),
    ),
    projections={
        ("0", "ffn_text"): ("map",),
        ("1", "ffn_image"): ("map",),
        ("1-3", "ffn_image"): ("map",),
        ("0", "ffn_image"): ("map",),
        ("4", "text"): ("map",),
        ("5", "text"): ("map", "step"),
        ("4-5", "text"): ("map", "step"),
        ("6", "ffn_image"): ("map",),
        ("7", "ffn_image"): ("map",),
        ("7", "text"): ("map",),
    },
    variants=(
        Variant(name="small", intervals=ALL),
        Variant(
            name="smallest",
            intervals=ALL,
            sites=(
                "ffn_text:0",
                "ffn_image:0",
                "ffn_image:1",
                "text:4-5",
                "ffn_image:6",
                "ffn_image:7",
                "text:7-7",
            ),
        ),
    ),
)
