"""FLUX.1's real names and shapes on the meta device: every tensor has a home, parameters are as published."""

import comfy.ops
import comfy.supported_models
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.bundle import STRUCTURE_TENSOR, empty_model
from ppcl_engine.checkpoint import expected_shapes
from ppcl_engine.layout import layout_of
from ppcl_engine.plan import Interval, PruningPlan, parse_sites

FLUX = architecture_named("flux1")


def meta(shapes: dict) -> dict[str, torch.Tensor]:
    """By the host's names, which fuse several of diffusers'."""
    found = {}
    for key, shape in shapes.items():
        part = FLUX.to_comfyui(key, shapes)
        whole = shape if part.of == 1 else (shape[0] // len(part.pieces) * part.of, *shape[1:])
        found[part.name] = torch.empty(whole, dtype=torch.bfloat16, device="meta")
    return found


@pytest.mark.parametrize(("name", "billions"), [("flux1_dev", 11.90), ("flux1_lite", 8.16)])
def test_full_size(pack, name, billions):
    building, host = pack("host.building"), pack("host.flux1").HOST
    config = FLUX.model_configs[name]
    tensors = meta(expected_shapes(FLUX, config))
    model = building.empty_host_model(host, tensors, comfy.ops.disable_weight_init, torch.bfloat16)
    building.check_tensors(model, pack("host.structure").structure_of(host, tensors).renamed(tensors))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


def test_only_what_the_host_cannot_load_is_claimed(pack):
    """Not the full models, in the host's lists by themselves; nor ControlNets."""
    host = pack("host.flux1")
    found = {"image_model": "flux", "guidance_embed": True, "in_channels": 16}
    full = meta(expected_shapes(FLUX, FLUX.model_configs["flux1_dev"]))
    plan = torch.zeros(1, dtype=torch.uint8)
    assert not host.PPCLFlux.matches(found, full) and host.PPCLFlux.matches(found, {**full, STRUCTURE_TENSOR: plan})
    control = {"controlnet_blocks.0.weight": torch.empty(0)}
    assert not host.PPCLFlux.matches(found, {**full, STRUCTURE_TENSOR: plan, **control})
    assert not host.PPCLFlux.matches({**found, "guidance_embed": False}, {**full, STRUCTURE_TENSOR: plan})
    assert not host.PPCLFlux.matches({"image_model": "qwen_image"}, full)
    assert [m.__name__ for m in comfy.supported_models.models].count("PPCLFlux") == 1


def test_a_pruned_dev(pack):
    """A standalone: depth, text, and FFNs in both kinds of blocks."""
    building, host, reading = pack("host.building"), pack("host.flux1").HOST, pack("stored")
    config = FLUX.model_configs["flux1_dev"]
    intervals = (Interval(first=3, last=6, correction="64"), Interval(first=30, last=37, correction="none"))
    sites = parse_sites("text:15-18 ffn_image:1 ffn_joint:40 ffn_joint:50")
    plan = PruningPlan(
        architecture=FLUX.name, config=config, num_blocks=57, fingerprint="f", intervals=intervals, sites=sites
    )
    layout = layout_of(plan, plan.everything())
    model = empty_model(FLUX, config, layout)
    tensors = {name: t.to("meta", torch.bfloat16) for name, t in model.state_dict().items()}
    file = type("File", (), {"shape": lambda self, n: tuple(tensors[n].shape), "read": lambda self, n: tensors[n]})()
    named = reading.in_host_names(host, config, {n: reading.Stored(file, n) for n in tensors}, layout.places)
    read = {name: reading.Reader().read(place) for name, place in named.items()}
    read[STRUCTURE_TENSOR] = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8)
    empty = building.empty_host_model(host, read, comfy.ops.disable_weight_init, torch.bfloat16)
    building.check_tensors(empty, pack("host.structure").structure_of(host, read).renamed(read))
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters())
    assert (len(empty.double_blocks), len(empty.single_blocks)) == (19, 38)
