"""Real names and shapes on the meta device, of architectures whose maps the host fuses: every
tensor has a home, parameters are as published."""

from importlib.util import find_spec

import comfy.supported_models
import pytest
import torch

from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.stored_layout import STRUCTURE_TENSOR
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import PruningPlan, parse_intervals, parse_sites

# billions
SIZES = {
    "flux1_dev": 11.901,
    "flux1_lite": 8.163,
    "sd35_large": 8.057,
    "sd35_medium": 2.243,
    "z_image": 6.155,
    "krea2": 12.820,
}
DETECTED = {
    "flux1": (
        "PPCLFlux",
        {"image_model": "flux", "guidance_embed": True, "in_channels": 16},
        "guidance_embed",
    ),
    "sd35": (
        "PPCLSD3",
        {"in_channels": 16, "pos_embed_scaling_factor": None},
        "pos_embed_scaling_factor",
    ),
    "z_image": ("PPCLZImage", {"image_model": "lumina2", "dim": 3840}, "dim"),
    "krea2": ("PPCLKrea2", {"image_model": "krea2"}, "image_model"),
}
PRUNED = {
    "flux1_dev": ("3-6 30-37", "text:15-18 ffn_image:1 ffn_joint:40 ffn_joint:50"),
    "sd35_large": ("3-6 30-36", "text:15-18 ffn_image:1 ffn_text:2 ffn_image:37 text:37"),
    "sd35_medium": ("3-6 11-14", "text:15-18 ffn_image:3 ffn_text:2 ffn_image:23 text:23"),
    "z_image": ("3-6 20-24", "ffn_joint:1 ffn_joint:10"),
    "krea2": ("3-6 20-24", "ffn_joint:1 ffn_joint:10"),
}
if not find_spec("comfy.ldm.krea2"):  # older versions of ComfyUI do not know it
    del SIZES["krea2"], PRUNED["krea2"]


def meta(engine, shapes: dict) -> dict[str, torch.Tensor]:
    """By the host's names, which fuse several of diffusers'."""
    tensors = {}
    for key, shape in shapes.items():
        part = engine.to_comfyui(key, shapes)
        tensors[part.name] = torch.empty(part.whole(shape), dtype=torch.bfloat16, device="meta")
    return tensors


def module_of(size: str) -> str:
    name = next(name for name in DETECTED if size.startswith(name))
    return f"host.{name}"


@pytest.fixture
def host_of(pack):
    """By the name of a size: "flux1_dev" """
    return lambda size: pack(module_of(size)).HOST


@pytest.mark.parametrize(("size", "billions"), SIZES.items())
def test_full_size(empty_host_model, host_of, size, billions):
    host = host_of(size)
    tensors = meta(host.engine, expected_shapes(host.engine, host.engine.model_configs[size]))
    model = empty_host_model(host, tensors)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


@pytest.mark.parametrize("size", PRUNED)
def test_only_what_the_host_cannot_load_is_claimed(pack, size):
    """Not the full models, in the host's lists by themselves; nor ControlNets."""
    module = pack(module_of(size))
    engine = module.HOST.engine
    name, detected, entry = DETECTED[engine.name]
    (ours,) = (c for c in pack("host.entries").config_classes(module.HOST) if c.__name__ == name)
    full = meta(engine, expected_shapes(engine, engine.model_configs[size]))
    pruned = {**full, STRUCTURE_TENSOR: torch.zeros(1, dtype=torch.uint8)}
    assert not ours.matches(detected, full) and ours.matches(detected, pruned)
    assert not ours.matches(detected, {**pruned, "controlnet_blocks.0.weight": torch.empty(0)})
    assert not ours.matches({**detected, entry: 7}, pruned) and not ours.matches(
        {"image_model": "qwen_image"}, full
    )
    assert [m.__name__ for m in comfy.supported_models.models].count(name) == 1


@pytest.mark.parametrize("size", PRUNED)
def test_a_pruned_model(pack, empty_host_model, host_of, size):
    """A standalone: depth, with and without a correction, text, and FFNs in every kind of block."""
    host, reading = host_of(size), pack("loading.stored")
    engine = host.engine
    config, (intervals, sites) = engine.model_configs[size], PRUNED[size]
    first, second = parse_intervals(intervals)
    plan = PruningPlan(
        architecture=engine.name,
        config=config,
        num_blocks=engine.num_blocks(config),
        fingerprint="f",
        intervals=(type(first)(**{**vars(first), "correction": "64"}), second),
        sites=parse_sites(sites),
    )
    layout = layout_of(plan, plan.everything())
    with torch.device("meta"):
        model = empty_model(engine, config, layout)
    tensors = {name: t.to("meta", torch.bfloat16) for name, t in model.state_dict().items()}
    file = type(
        "File",
        (),
        {"shape": lambda self, n: tuple(tensors[n].shape), "read": lambda self, n: tensors[n]},
    )()
    named = reading.in_host_names(
        host, config, {n: reading.Stored(file, n) for n in tensors}, layout.places
    )
    read = {name: reading.Reader().read(place) for name, place in named.items()}
    read[STRUCTURE_TENSOR] = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8)
    empty = empty_host_model(host, read)
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters())
    assert sum(len(getattr(empty, blocks.name)) for blocks in host.lists) == plan.num_blocks
