"""What the host's own nodes are tried on, and what they are compared with: variants, blocks and a
ControlNet for each architecture; the host's full-depth model; the engine with a LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import comfy.controlnet
import comfy.latent_formats
import comfy.ops
import torch
from comfy.cldm.dit_embedder import ControlNetEmbedder
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.ldm.flux.model import FluxParams

from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..forwards import engine_forward

IMAGE_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What the host's nodes are tried on, of one architecture."""

    depth: dict[str, list[str]]
    """variants without width -> their intervals"""
    width: tuple[str, ...]
    """other variants"""
    blocks: tuple[int, ...]
    """number of blocks in each of the host's lists"""
    guided: dict[str, str]
    """widgets of skip-layer guidance: the blocks that it leaves out"""
    control: Callable[[], comfy.controlnet.ControlNet]
    """makes the host's ControlNet of this architecture, small and random"""
    unnamed: str = "no such name"
    """part of the names of maps that a LoRA by diffusers' names is not tested with"""

    def slot(self, index: int) -> tuple[str, int]:
        """The key of a block in the host's `patches_replace`."""
        first = self.blocks[0]
        return ("double_block", index) if index < first else ("single_block", index - first)


def flux_control() -> comfy.controlnet.ControlNet:
    sizes = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 20,
        "context_in_dim": 24,
        "hidden_size": 32,
    }
    if "txt_ids_dims" in inspect.signature(FluxParams).parameters:
        sizes["txt_ids_dims"] = []
    network = ControlNetFlux(
        **sizes,
        latent_input=True,
        mlp_ratio=4.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[2, 6, 8],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        control_latent_channels=16,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    network.main_model_double, network.main_model_single = FLUX.blocks
    return comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.Flux(),
        load_device=torch.device("cpu"),
        extra_conds=["y", "guidance"],
    )


def sd35_control() -> comfy.controlnet.ControlNet:
    """As the released ones of the large model: it takes the pooled text's embedding from the model
    that it guides."""
    network = ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        attention_head_dim=64,
        num_attention_heads=2,
        adm_in_channels=20,
        num_layers=2,
        main_model_double=SD35.blocks[0],
        double_y_emb=True,
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return comfy.controlnet.ControlNetSD35(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.SD3(),
        load_device=torch.device("cpu"),
    )


FLUX = Adapted(
    depth={"1-2": ["1-2"], "6-7": ["6-7"], "9-10": ["9-10"], "small": ["1-2", "6-7", "9-10"]},
    width=("full", "1-2,text:3-4", "6-7,ffn_joint:6", "smallest"),
    blocks=(5, 6),
    guided={"double_layers": "0, 4", "single_layers": "0, 3"},
    control=flux_control,
)
SD35 = Adapted(
    depth={"1-3": ["1-3"], "4-5": ["4-5"], "small": ["1-3", "4-5"]},
    width=("full", "1-3,text:4-5", "1-3,ffn_image:1", "smallest"),
    blocks=(8,),
    guided={"double_layers": "0, 6", "single_layers": ""},
    control=sd35_control,
    unnamed="norm1_context",  # the host takes the last block from the width: `test_sd35_layout.py`
)
ADAPTED = {"flux1": FLUX, "sd35": SD35}


def corrected(student):
    """A patch for a block that adds the student's correction to what the block returns."""

    def run(args, extra):
        out = extra["original_block"](args)
        if "txt" in out:
            image, text = (
                student.correction.correct(s, out[k])
                for s, k in (("image", "img"), ("text", "txt"))
            )
            return {"img": image, "txt": text}
        text, image = out["img"].split([out["img"].shape[1] - IMAGE_TOKENS, IMAGE_TOKENS], dim=1)
        both = [student.correction.correct(s, x) for s, x in (("text", text), ("image", image))]
        return {"img": torch.cat(both, dim=1)}

    return run


def full_depth_reference(load, bundle, teacher, models, architecture, slot):
    """Intervals -> the host's full-depth model with the students' weights, which skips the blocks
    behind each student and adds its correction. slot: a block's key in `patches_replace`."""
    parts, weights = Bundle(bundle), Weights(teacher)
    students = {i.name: parts.student(i, torch.float32, "cpu") for i in parts.plan.intervals}

    def make(names: list[str]):
        grafted = {key: weights.read(key) for key in weights.keys()}
        for name in names:
            prefix = architecture.block_prefix(weights.config, parts.plan.interval(name).first)
            own = students[name].state_dict().items()
            grafted |= {prefix + key: t for key, t in own if not key.startswith("correction.")}
        file = (
            models.diffusion_models / f"{architecture.name}_grafted_{'_'.join(names)}.safetensors"
        )
        write_tensors(file, grafted, TensorFile(teacher).metadata)
        model = load(file.name).clone()
        for name in names:
            first, *others = parts.plan.interval(name).blocks
            for index in others:
                model.set_model_patch_replace(lambda args, extra: args, "dit", *slot(index))
            if parts.plan.interval(name).correction != "none":
                model.set_model_patch_replace(corrected(students[name]), "dit", *slot(first))
        return model

    return make


def engine_with(lora, model, architecture, inputs) -> torch.Tensor:
    """The engine's velocity with the changes of a LoRA added to its weights: a map may be cut, and a
    projection takes no LoRA."""
    weights = dict(model.named_parameters())
    for key, change in lora.items():
        projected = (
            key.endswith("proj_mlp.weight")
            and weights.get(key) is not None
            and weights[key].shape != change.shape
        )
        if key in weights and not projected:
            weights[key].add_(_left(change, weights[key].shape))
    return engine_forward(architecture, model, inputs)


def _left(change: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The part of a change that still applies: a modulation keeps its first half, or loses its middle
    third (attention is in it twice); a joint map keeps what attention reads."""
    if 3 * shape[0] == 2 * change.shape[0]:
        first, _, last = change.chunk(3)
        return torch.cat([first, last])
    return change[: shape[0], : shape[1]]
