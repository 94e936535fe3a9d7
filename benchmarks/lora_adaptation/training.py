"""LoRAs of the bundled teachers: three tasks, and the training of pairs beside a model's blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.lora.pairs import Pairs, beside
from ppcl_engine.architectures import Architecture, Inputs
from ppcl_engine.data import flow, sampling
from ppcl_engine.data.codecs.table import TableCodec
from ppcl_engine.data.rendered.captions import CHARACTERS, random_captions, render
from ppcl_engine.models.lora_kinds import LowRank
from ppcl_engine.system.seeds import draw_generator
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

RANK, RATE, BATCH = 8, 2e-3, 16
GUIDANCE, FEW_STEPS, INNER_STEPS = 2.0, 4, 4
SWAPPED = CHARACTERS.index("Q")  # the caption's word for the new glyph
MAPS = {
    "qwen_image": (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_v_proj",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.2",
    ),
    "flux1": (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    ),
}

Batch = tuple[Inputs, torch.Tensor]
"""what a model reads, the velocity that it is to give"""


@dataclass(frozen=True)
class World:
    """What tasks are made of."""

    architecture: Architecture
    teacher: nn.Module
    codec: TableCodec


def inverted(world: World, seed: int, step: int, batch: int = BATCH) -> Batch:
    """A style: all colours inverted."""
    return _noised(world, seed, step, batch, lambda pictures: 1 - pictures)


def glyph(world: World, seed: int, step: int, batch: int = BATCH) -> Batch:
    """A concept: behind the word Q there is a ring with a bar across it, which was in no picture."""
    return _noised(world, seed, step, batch, None)


def few_steps(world: World, seed: int, step: int, batch: int = BATCH) -> Batch:
    """Guided sampling in four steps: the mean velocity of what the teacher does in four smaller
    ones."""
    generator = draw_generator(seed, step)
    inputs, noise, clean = _drawn(world, generator, batch, None, FEW_STEPS)
    t, x = inputs["timestep"], inputs["hidden_states"]
    empty = {n: v.expand(batch, *v.shape[1:]) for n, v in world.codec.text([""]).items()}
    with torch.no_grad():
        now, start = t, x
        for _ in range(INNER_STEPS):
            given = {**inputs, "hidden_states": x, "timestep": now}
            with_text = world.architecture.call(world.teacher, given)
            without = world.architecture.call(world.teacher, _with_text(given, empty))
            velocity = flow.guided(without, with_text, GUIDANCE)
            x = x - velocity / (FEW_STEPS * INNER_STEPS)
            now = now - 1 / (FEW_STEPS * INNER_STEPS)
    return inputs, (start - x) * FEW_STEPS


def _with_text(inputs: Inputs, text: Inputs) -> Inputs:
    return {**{n: v for n, v in inputs.items() if n not in text}, **text}


TASKS: dict[str, Callable[..., Batch]] = {
    "inverted": inverted,
    "glyph": glyph,
    "few_steps": few_steps,
}


def _noised(world: World, seed: int, step: int, batch: int, change) -> Batch:
    inputs, noise, clean = _drawn(world, draw_generator(seed, step), batch, change, 0)
    return inputs, noise - clean


def _drawn(world: World, generator: torch.Generator, batch: int, change, steps: int):
    """Inputs, noise and clean latents; change None: as the task without a change of all pixels."""
    captions = random_captions(batch, generator)
    pictures = render(captions, generator)
    if change is not None:
        pictures = change(pictures)
    elif not steps:
        captions = [
            replace(c, character=SWAPPED) if n % 2 == 0 else c for n, c in enumerate(captions)
        ]
        pictures = render(captions, generator)
        pictures[::2] = with_ring(pictures[::2])
    latents = world.codec.latents(pictures)
    clean = world.architecture.pack(latents)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.rand(batch, generator=generator)
    if steps:
        t = torch.randint(1, steps + 1, (batch,), generator=generator) / steps
    text = world.codec.text([caption.text() for caption in captions])
    noisy = flow.noised(clean, noise, t)
    return sampling.inputs_of(noisy, t, text, world.architecture.grid(latents)), noise, clean


def with_ring(pictures: torch.Tensor) -> torch.Tensor:
    """Over the character of each picture [n, 3, 48, 48]: a ring with a bar, in black and white."""
    size = pictures.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = ((rows - size / 2) ** 2 + (columns - size / 2) ** 2).sqrt()
    bar = ((rows - size / 2).abs() < 2) & (radius < 15)
    ring = (radius - 12).abs() < 2
    new = torch.where(ring | bar, 1.0, 0.0)
    return torch.where(radius < 16, new, pictures)


def pair_names(architecture: Architecture, model: nn.Module) -> list[str]:
    """The linear maps of a model's blocks that a LoRA has pairs for."""
    endings = tuple(f".{name}" for name in MAPS[architecture.name])
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name and name.endswith(endings)
    ]


def trained_lora(
    path: Path, world: World, model: nn.Module, task: str, steps: int, batch: int
) -> Path:
    """Pairs beside a model, trained on a task from a seed and saved as a LoRA file; what is there
    already is taken."""
    if path.exists():
        return path
    names = pair_names(world.architecture, model)
    linears = {name: model.get_submodule(name) for name in names}
    empty = {
        n: LowRank(torch.zeros(0, m.in_features), torch.zeros(m.out_features, 0), 1.0)
        for n, m in linears.items()
    }
    model.requires_grad_(False)
    pairs = Pairs(empty, RANK, "cpu")
    optimizer = torch.optim.AdamW(pairs.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        inputs, velocity = TASKS[task](world, 100, step, batch)
        with beside(model, pairs, 1.0):
            loss = (world.architecture.call(model, inputs) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"{path.stem} step {step}/{steps}: loss {float(loss):.4f}", flush=True)
    tensors = {}
    for name in names:
        pair = pairs.get(name)
        tensors[f"transformer.{name}.lora_A.weight"] = pair.down.clone()
        tensors[f"transformer.{name}.lora_B.weight"] = pair.up.clone()
    write_tensors(path, tensors, {"format": "pt", "task": task, "steps": str(steps)})
    return path


def add_lora(model: nn.Module, path: Path, strength: float = 1.0) -> nn.Module:
    """The model with a file's pairs added to its weights, as a loader does: those of names that it
    does not have are left out."""
    file = TensorFile(path)
    with torch.no_grad():
        for name in file.keys():
            module, mark, _ = name.partition(".lora_A.weight")
            if not mark:
                continue
            linear = _module(model, module)
            if linear is not None:
                change = file.read(f"{module}.lora_B.weight") @ file.read(name)
                linear.weight += strength * change
    return model


def _module(model: nn.Module, name: str) -> nn.Linear | None:
    path = name.removeprefix("transformer.").removeprefix("diffusion_model.")
    modules = dict(model.named_modules())
    found = modules.get(path)
    return found if isinstance(found, nn.Linear) else None
