"""Qwen-Image's real names and shapes on the meta device: every tensor has a home, parameters are as
published."""

import comfy.supported_models
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.released import released_layout, stored_tensors
from ppcl_engine.models.stored_layout import STRUCTURE_TENSOR
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import Interval, PruningPlan, parse_intervals, parse_sites

QWEN = architecture_named("qwen_image")
REAL = QWEN.model_configs["qwen_image"]
PUBLISHED = QWEN.released.intervals["Qwen-Image-12B"][2]
TEN = {  # method.md 6, by the numbers after removal
    "single_stream_index": [19, 23, *range(29, 35)],
    "ehs_proj_index": [19, 23, 34],
    "ffn_proj_index": [2, 33, 34],
}


def meta(shapes: dict) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def host_model(pack, empty_host_model):
    """(parameters of the host's model, its blocks); every tensor was given a home."""

    def make(tensors: dict):
        model = empty_host_model(pack("host.qwen_image").HOST, tensors)
        return sum(p.numel() for p in model.parameters()), model.transformer_blocks

    return make


def kept_blocks(blocks) -> list[int]:
    return [index for index, block in enumerate(blocks) if any(True for _ in block.parameters())]


def released_shapes(lists: dict) -> dict:
    config = {**REAL, "num_layers": 35}
    layout = released_layout(QWEN, {**config, **lists}, "test")
    names, shapes, unused = stored_tensors(QWEN, config, layout)
    full = expected_shapes(QWEN, config)
    return {names[name]: shape for name, shape in shapes.items()} | {
        name: full[name] for name in unused.values()
    }


def test_the_full_model(host_model):
    parameters, blocks = host_model(meta(expected_shapes(QWEN, REAL)))
    assert round(parameters / 1e9, 2) == 20.43 and len(blocks) == 60


@pytest.mark.parametrize(("lists", "billions"), [({}, 11.93), (TEN, 10.60)], ids=["12B", "10B"])
def test_released_models(host_model, lists, billions):
    """Their blocks come to stand at the original's indices by themselves, since 35 of 60 is a
    published choice. A text-pruned block's unused attn.to_add_out is counted in the published size
    and left out here."""
    shapes = released_shapes(lists)
    parameters, blocks = host_model(meta(shapes))
    unused = sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if _unused(name, lists)
    )
    assert round((parameters + unused) / 1e9, 2) == billions
    removed = {block for interval in parse_intervals(PUBLISHED) for block in interval.blocks[1:]}
    assert len(blocks) == 60 and kept_blocks(blocks) == [
        index for index in range(60) if index not in removed
    ]


def _unused(name: str, lists: dict) -> bool:
    return ".attn.to_add_out." in name and int(name.split(".")[1]) in lists.get(
        "single_stream_index", []
    )


@pytest.mark.parametrize("correction", ["none", "affine", "16"])
def test_our_own_ten_billion(host_model, correction):
    intervals = tuple(
        Interval(first=i.first, last=i.last, correction=correction)
        for i in parse_intervals(PUBLISHED)
    )
    sites = parse_sites(
        "text:37 text:41 text:51-59 ffn_image:2 ffn_text:2 ffn_image:58 ffn_image:59"
    )
    plan = PruningPlan(
        architecture=QWEN.name,
        config=REAL,
        num_blocks=60,
        fingerprint="f",
        intervals=intervals,
        sites=sites,
    )
    model = empty_model(QWEN, REAL, layout_of(plan, plan.everything()))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    structure = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8)
    parameters, blocks = host_model({**meta(shapes), STRUCTURE_TENSOR: structure})
    assert parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert len(blocks) == 60 and len(kept_blocks(blocks)) == 35


def test_only_what_the_host_cannot_load_is_claimed(pack):
    """Not the full model, not a native standalone, not a ControlNet, pruned or not."""
    (config,) = pack("host.entries").config_classes(pack("host.qwen_image").HOST)
    matches = config.matches
    detected = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
    full, ten = meta(expected_shapes(QWEN, REAL)), meta(released_shapes(TEN))
    control = {
        "controlnet_blocks.0.weight": torch.empty(0),
        "controlnet_x_embedder.weight": torch.empty(0),
    }
    assert matches(detected, ten) and matches(
        detected, {f"model.diffusion_model.{name}": t for name, t in ten.items()}
    )
    assert not matches(detected, full) and not matches(detected, meta(released_shapes({})))
    assert not matches(detected, {**full, **control}) and not matches(detected, {**ten, **control})
    assert not matches({"image_model": "flux"}, ten)


def test_registering_again_does_not_double(pack):
    register, known = pack("host").register, comfy.supported_models.models
    before = len(known)
    register()
    assert len(known) == before and [m.__name__ for m in known].count("PPCLQwenImage") == 1
