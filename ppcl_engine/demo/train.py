"""Train a small teacher from a seed: `python -m ppcl_engine.demo.train --teacher flux --output
teacher_flux.safetensors`.

Rectified flow (velocity = noise - picture) on rendered pictures, new ones at every step. Batches depend
on (seed, step) alone, so an interrupted run goes on from its last save and ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..architectures import Architecture, Inputs, architecture_named, placed
from ..data.codecs.table import TableCodec
from ..data.rendered.captions import random_captions, render
from ..data.rendered.tables import TEXT_WIDTH, fit_codec
from ..data.sampling import inputs_of
from ..models.stored_layout import COMFYUI_PREFIX
from ..models.tensor_sources import Source, comfyui_sources
from ..system.atomic import write_json
from ..system.seeds import draw_generator
from ..system.tensor_files import write_tensors


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A small model of one architecture."""

    architecture: Architecture
    config: dict
    """as in a diffusers config.json"""
    numbered: bool
    """whether the codec has to give its text tokens positions"""
    zeroed: str
    """pattern of the names of weights that start at zero, so that every block starts as the identity
    and the model predicts 0"""


KINDS = {
    "qwen": Kind(
        architecture=architecture_named("qwen_image"),
        config={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": [4, 14, 14],
        },
        numbered=False,
        zeroed=r"img_mod|txt_mod|norm_out|^proj_out",
    ),
    "flux": Kind(
        architecture=architecture_named("flux1"),
        config={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 8,
            "num_single_layers": 16,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": TEXT_WIDTH,
            "pooled_projection_dim": TEXT_WIDTH,
            "guidance_embeds": False,
            "axes_dims_rope": [4, 14, 14],
        },
        numbered=True,
        zeroed=r"norm1?(_context)?\.linear|norm_out|^proj_out",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a teacher is trained."""

    teacher: str = "qwen"
    """a key of KINDS"""
    seed: int = 0
    steps: int = 8000
    batch: int = 48
    """pictures in a step"""
    learning_rate: float = 1.5e-3
    """the peak"""
    final_learning_rate_share: float = 0.03
    """learning rate at the end, relative to the peak"""
    constant_share: float = 0.35
    """share of the steps that end with the peak learning rate"""
    warm_up: int = 150
    """steps until the peak learning rate"""
    weight_decay: float = 0.01
    """of matrices"""
    clip: float = 1.0
    """largest norm of the gradient"""
    average_decay: float = 0.998
    """of the averaged weights, which are the result"""
    empty_captions: float = 0.1
    """share of the captions that are empty"""
    save_every: int = 250
    """steps"""


RECIPES = {"qwen": Recipe(), "flux": Recipe(teacher="flux", steps=5000, constant_share=0.45)}


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant for `constant_share` of the run, then cosine to its final share."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    start = recipe.constant_share * recipe.steps
    progress = max(0.0, (step - start) / max(1.0, recipe.steps - start))
    low = recipe.final_learning_rate_share
    return recipe.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def training_batch(
    kind: Kind, codec: TableCodec, recipe: Recipe, step: int
) -> tuple[Inputs, torch.Tensor]:
    """(what the model reads, the velocity that it has to give)"""
    generator = draw_generator(recipe.seed, step + 1)
    captions = random_captions(recipe.batch, generator)
    latents = codec.latents(render(captions, generator))
    clean = kind.architecture.pack(latents)
    noise = torch.randn(clean.shape, generator=generator)
    logit_normal = torch.sigmoid(0.4 + torch.randn(recipe.batch, generator=generator))
    uniform = torch.rand(recipe.batch, generator=generator)
    t = torch.where(torch.rand(recipe.batch, generator=generator) < 0.7, logit_normal, uniform)
    keep = torch.rand(recipe.batch, generator=generator) >= recipe.empty_captions
    keep[0] = True  # one caption in every batch keeps the text's length, and so the compiled shape
    texts = [c.text() if k else "" for c, k in zip(captions, keep.tolist(), strict=True)]
    noisy = torch.lerp(clean, noise, t[:, None, None])
    return inputs_of(noisy, t, codec.text(texts), kind.architecture.grid(latents)), noise - clean


def new_teacher(kind: Kind, seed: int) -> torch.nn.Module:
    """Xavier weights; modulations and the output layers start at zero."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, kind.architecture.diffusers_class)(**kind.config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        if re.search(kind.zeroed, name):
            torch.nn.init.zeros_(parameter)
    return model


def blocks_of(kind: Kind, model: torch.nn.Module) -> list[torch.nn.Module]:
    indices = range(kind.architecture.num_blocks(kind.config))
    return [
        model.get_submodule(kind.architecture.block_prefix(kind.config, i).rstrip("."))
        for i in indices
    ]


def train(recipe: Recipe, output: Path, compiled: bool, device: str) -> None:
    kind = KINDS[recipe.teacher]
    codec = fit_codec(recipe.seed, kind.numbered)
    model = new_teacher(kind, recipe.seed).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    resume = output.with_suffix(".resume.safetensors")
    step = load_progress(resume, recipe, model, optimizer, average) if resume.exists() else 0
    if compiled:
        for block in blocks_of(kind, model):
            block.compile(dynamic=False)
    start, first, losses = time.monotonic(), step, []
    while step < recipe.steps:
        inputs, velocity = training_batch(kind, codec, recipe, step)
        predicted = kind.architecture.call(model, placed(inputs, device, torch.float32))
        loss = (predicted - velocity.to(device)).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        step += 1
        decay = min(recipe.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            weights: list[torch.Tensor] = [*model.parameters()]
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            rate = (step - first) / (time.monotonic() - start)
            print(
                f"step {step}/{recipe.steps}  loss {sum(losses) / len(losses):.4f}  "
                f"{rate:.2f} steps/s  {(recipe.steps - step) / rate / 60:.0f} min left",
                flush=True,
            )
            losses = []
        if step % recipe.save_every == 0 or step == recipe.steps:
            save_progress(resume, recipe, step, model, optimizer, average)
            save_teacher(kind, output, recipe, step, {**model.state_dict(), **average}, codec)
    write_json(
        output.with_suffix(".json"), {"recipe": asdict(recipe), "seconds": time.monotonic() - start}
    )


def save_progress(path: Path, recipe: Recipe, step: int, model, optimizer, average) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors |= {f"weight.{name}": parameter.data, f"average.{name}": average[name]}
        # nothing reads the last block's text, so its weights get no gradient and have no state
        if state := optimizer.state.get(parameter):
            tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
    write_tensors(path, tensors, {"step": str(step), "recipe": json.dumps(asdict(recipe))})


def load_progress(path: Path, recipe: Recipe, model, optimizer, average) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["recipe"]) != asdict(recipe):
            raise SystemExit(
                f"{path} was made with other options; use the same options, or move it away"
            )
        step, names = int(metadata["step"]), set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            average[name].copy_(file.get_tensor(f"average.{name}"))
            if f"first.{name}" in names:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"first.{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"second.{name}").to(parameter.device),
                }
    return step


def save_teacher(
    kind: Kind,
    path: Path,
    recipe: Recipe,
    step: int,
    state: dict[str, torch.Tensor],
    codec: TableCodec,
) -> None:
    """Writes a ComfyUI checkpoint, which stock hosts can read too. state: weights and buffers."""
    sources = {name: Source(tuple(t.shape), lambda t=t: t) for name, t in state.items()}
    named = {
        name: source.read() for name, source in comfyui_sources(kind.architecture, sources).items()
    }
    tensors = {f"{COMFYUI_PREFIX}{name}": t.to("cpu", torch.bfloat16) for name, t in named.items()}
    metadata = {
        "config": json.dumps({"_class_name": kind.architecture.diffusers_class, **kind.config}),
        "recipe": json.dumps(asdict(recipe)),
        "step": str(step),
        "license": "Apache-2.0",
        **codec.metadata(),
    }
    write_tensors(path, tensors | codec.tensors(), metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--teacher", choices=tuple(RECIPES), default=Recipe.teacher, help="its architecture"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/teacher/teacher.safetensors"))
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of training; by default as many as the teacher was made with",
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="run the blocks uncompiled, for a machine without a C++ compiler",
    )
    options = parser.parse_args()
    recipe = replace(RECIPES[options.teacher], seed=options.seed)
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    train(recipe, options.output, not options.no_compile, options.device)


if __name__ == "__main__":
    main()
