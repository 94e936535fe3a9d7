"""Which modules of a LoRA have a place in a variant."""

import pytest

from ppcl_engine.layout import Layout, Place, full_layout
from ppcl_engine.lora import coverage
from ppcl_engine.plan import Interval, WidthSite

PARTS = (
    "attn.to_q.weight",
    "attn.to_add_out.weight",
    "img_mod.1.weight",
    "img_mlp.net.2.weight",
    "txt_mlp.net.2.weight",
)
TARGETS = [f"transformer_blocks.{b}.{p}" for b in range(12) for p in PARTS] + ["img_in.weight"]
STUDENT = Interval(first=3, last=5)
BLOCKS = [Place(index=i, interval=STUDENT if i == 3 else None) for i in range(12) if i not in (4, 5)]


def changed(index: int, **parts) -> Layout:
    places = tuple(Place(index=index, **parts) if p.index == index else p for p in BLOCKS)
    return Layout(num_blocks=12, places=places)


def test_the_full_model_takes_everything():
    found = coverage(TARGETS, [], full_layout(12))
    assert found.text().startswith(f"covers {len(TARGETS)} of {len(TARGETS)} modules\nreached: ")
    assert found.reached[0] == "img_in.weight" and found.reached[-1].startswith("transformer_blocks.11.")


def test_blocks_inside_an_interval_are_removed():
    found = coverage(TARGETS, [], Layout(num_blocks=12, places=tuple(BLOCKS)))
    assert {name.split(".")[1] for name in found.removed} == {"4", "5"} and len(found.removed) == 2 * len(PARTS)
    assert "covers 51 of 61 modules; 10 belong to removed blocks" in found.text()


@pytest.mark.parametrize(
    "parts, projected, halved",
    [
        ({"ffn": (WidthSite(block=7, kind="ffn_image", form="gated"),)}, {"img_mlp.net.2.weight"}, set()),
        ({"ffn": (WidthSite(block=7, kind="ffn_image"),)}, {"img_mlp.net.2.weight"}, {"img_mod.1.weight"}),
        ({"text_source": 6}, {"attn.to_add_out.weight", "txt_mlp.net.2.weight"}, set()),
    ],
)
def test_projected_parts(parts, projected, halved):
    found = coverage(TARGETS, ["joint.0"], changed(7, **parts))
    prefix = "transformer_blocks.7."
    assert set(found.projected) == {prefix + name for name in projected}
    assert set(found.halved) == {prefix + name for name in halved} <= set(found.reached)
    assert found.unknown == ("joint.0",) and found.count == len(TARGETS) + 1
    assert f"{len(projected)} belong to projected parts; 1 are not of this model" in found.text()
    assert len(found.text().splitlines()[-1]) < 1000
