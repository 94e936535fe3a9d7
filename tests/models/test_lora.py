"""Which modules of a LoRA have a place in a variant."""

import pytest

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.layout import Layout, Place, full_layout
from ppcl_engine.models.lora import coverage
from ppcl_engine.plan import Interval, WidthSite

QWEN = architecture_named("qwen_image")
PARTS = (
    "attn.to_q.weight",
    "attn.to_add_out.weight",
    "img_mod.1.weight",
    "img_mlp.net.2.weight",
    "txt_mlp.net.2.weight",
)
TARGETS = [f"transformer_blocks.{b}.{p}" for b in range(12) for p in PARTS] + ["img_in.weight"]
STUDENT = Interval(first=3, last=5)
BLOCKS = [
    Place(index=i, interval=STUDENT if i == 3 else None) for i in range(12) if i not in (4, 5)
]


def changed(index: int, **parts) -> Layout:
    places = tuple(Place(index=index, **parts) if p.index == index else p for p in BLOCKS)
    return Layout(num_blocks=12, places=places)


def test_the_full_model_takes_everything():
    found = coverage(QWEN, QWEN.tiny_config, TARGETS, [], full_layout(12))
    assert found.text().startswith(f"covers {len(TARGETS)} of {len(TARGETS)} modules\nreached: ")
    assert found.reached[0] == "img_in.weight" and found.reached[-1].startswith(
        "transformer_blocks.11."
    )


def test_blocks_inside_an_interval_are_removed():
    found = coverage(
        QWEN, QWEN.tiny_config, TARGETS, [], Layout(num_blocks=12, places=tuple(BLOCKS))
    )
    assert {name.split(".")[1] for name in found.removed} == {"4", "5"} and len(
        found.removed
    ) == 2 * len(PARTS)
    assert "covers 51 of 61 modules; 10 belong to removed blocks" in found.text()


@pytest.mark.parametrize(
    "parts, projected, halved",
    [
        (
            {"ffn": (WidthSite(block=7, kind="ffn_image", form="gated"),)},
            {"img_mlp.net.2.weight"},
            set(),
        ),
        (
            {"ffn": (WidthSite(block=7, kind="ffn_image"),)},
            {"img_mlp.net.2.weight"},
            {"img_mod.1.weight"},
        ),
        ({"text_source": 6}, {"attn.to_add_out.weight", "txt_mlp.net.2.weight"}, set()),
    ],
)
def test_projected_parts(parts, projected, halved):
    found = coverage(QWEN, QWEN.tiny_config, TARGETS, ["joint.0"], changed(7, **parts))
    prefix = "transformer_blocks.7."
    assert set(found.projected) == {prefix + name for name in projected}
    assert set(found.halved) == {prefix + name for name in halved} <= set(found.reached)
    assert found.unknown == ("joint.0",) and found.count == len(TARGETS) + 1
    assert f"{len(projected)} belong to projected parts; 1 are not of this model" in found.text()
    assert len(found.text().splitlines()[-1]) < 1000


def test_parts_of_blocks_of_two_kinds():
    """FLUX: names of single blocks are counted from 0 again; what a map of both streams loses is
    cut."""
    flux = architecture_named("flux1")
    config = {**flux.tiny_config, "num_layers": 2, "num_single_layers": 3}
    joint = (WidthSite(block=4, kind="ffn_joint", form="gated"),)
    places = (
        Place(index=0, publishes=True),
        Place(index=1, text_source=0),
        Place(index=2, interval=Interval(first=2, last=3)),
        Place(index=4, ffn=joint),
    )
    names = {
        "transformer_blocks.1.ff_context.net.2.weight": "projected",
        "transformer_blocks.1.ff.net.2.weight": "reached",
        "single_transformer_blocks.0.proj_mlp.weight": "reached",
        "single_transformer_blocks.1.proj_mlp.weight": "removed",
        "single_transformer_blocks.2.proj_mlp.weight": "projected",
        "single_transformer_blocks.2.proj_out.weight": "reached",
    }
    found = coverage(flux, config, names, [], Layout(num_blocks=5, places=places))
    assert {
        name: where
        for where in ("reached", "removed", "projected")
        for name in getattr(found, where)
    } == names
    assert found.halved == ("single_transformer_blocks.2.proj_out.weight",)
