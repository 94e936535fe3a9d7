"""Let a teacher draw captions and count what the reader recognises.

`python -m ppcl_engine.demo.accuracy --teacher teacher.safetensors --output DIR` writes
DIR/teacher_accuracy.json and DIR/teacher_grid.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..files import replacing, write_json
from .codec import BLOCK, CHANNELS, Codec
from .reader import load_reader, read, score
from .task import CHARACTERS, COLOUR_NAMES, FIELDS, SHAPES, SIZE, Caption, caption_table, random_captions
from .train import pack, predict

MODEL_PREFIX = "model.diffusion_model."
CHUNK = 50  # captions drawn together; a forward sees each twice
RESAMPLES = 2000
GRID_SAMPLES, GRID_COLUMNS, GRID_SCALE = 48, 12, 2
RED, INK, PAPER = (205, 30, 30), (30, 30, 30), (255, 255, 255)


def load_teacher(path: Path):
    """The model and codec of a file that `train.save_teacher` wrote.

    Returns (QwenImageTransformer2DModel in fp32 and evaluation mode, Codec). Raises ValueError
    when the file holds no config or no codec, RuntimeError when a tensor is missing or unknown.
    """
    from diffusers import QwenImageTransformer2DModel
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "config" not in metadata or "vae.decode" not in tensors:
        raise ValueError(f"{path} is not a demo teacher: it needs a config and the codec's tensors; train one first")
    config = json.loads(metadata["config"])
    config.pop("_class_name")
    model = QwenImageTransformer2DModel(**config)
    codec = Codec.from_tensors(tensors)
    weights = {k.removeprefix(MODEL_PREFIX): t.float() for k, t in tensors.items() if k not in codec.tensors()}
    model.load_state_dict(weights)
    return model.eval(), codec


@torch.no_grad()
def draw(
    model,
    codec: Codec,
    texts: list[str],
    seed: int,
    steps: int,
    guidance: float,
    report: Callable[[str], None] = lambda line: None,
) -> torch.Tensor:
    """Pictures [n, 3, 48, 48] in [0, 1] of the texts, on the CPU.

    Euler on x' = v(x, t) from noise at t = 1 to the picture at t = 0 in `steps` equal steps, with
    v = empty + guidance * (caption - empty) (Ho and Salimans 2022, arXiv:2207.12598). The noise of
    text i depends on (seed, i) alone. `report` gets a line of progress a chunk.
    Raises ValueError when a text has a word unknown to the codec.
    """
    device = next(model.parameters()).device
    noise = torch.stack([noise_for(seed, index) for index in range(len(texts))])
    start, pictures = time.monotonic(), []
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        embeddings, mask = (part.to(device) for part in codec.text(chunk + [""] * len(chunk)))
        tokens = pack(noise[first : first + CHUNK]).to(device)
        tokens = _euler(model, tokens, embeddings, mask, steps, guidance)
        pictures.append(codec.pictures(unpack(tokens.cpu())))
        rate = (first + len(chunk)) / (time.monotonic() - start)
        left = (len(texts) - first - len(chunk)) / rate
        report(f"drawn {first + len(chunk)}/{len(texts)}  {rate:.2f} pictures/s  {left:.0f} s left")
    return torch.cat(pictures)


def noise_for(seed: int, index: int) -> torch.Tensor:
    """Standard normal [16, 12, 12], the start of picture `index`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index + 1)
    side = SIZE // BLOCK
    return torch.randn(CHANNELS, side, side, generator=generator)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [n, h/2 * w/2, 4c] -> latents [n, c, h, w] with h = w; the inverse of `train.pack`."""
    n, _, width = tokens.shape
    half = SIZE // BLOCK // 2
    grid = tokens.view(n, half, half, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, width // 4, 2 * half, 2 * half)


def _euler(model, tokens, embeddings, mask, steps: int, guidance: float) -> torch.Tensor:
    for step in range(steps):
        batch = {
            "noisy": torch.cat([tokens, tokens]),
            "t": torch.full((2 * len(tokens),), 1 - step / steps, device=tokens.device),
            "text": embeddings,
            "mask": mask,
        }
        caption, empty = predict(model, batch).chunk(2)
        tokens = tokens - (empty + guidance * (caption - empty)) / steps
    return tokens


def bootstrap_interval(right: torch.Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of bool [n]."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(right), (RESAMPLES, len(right)), generator=generator)
    low, high = right.double()[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def confusions(readings: torch.Tensor, captions: list[Caption]) -> list[dict]:
    """What was read in place of what, most frequent first: {"field", "caption", "read", "count"}."""
    names = (CHARACTERS, COLOUR_NAMES, SHAPES, COLOUR_NAMES, COLOUR_NAMES)
    table = caption_table(captions)
    pairs = Counter(
        (FIELDS[column], names[column][table[row, column]], names[column][readings[row, column]])
        for row, column in (readings != table).nonzero().tolist()
    )
    return [dict(zip(("field", "caption", "read", "count"), (*key, n), strict=True)) for key, n in pairs.most_common()]


def write_grid(path: Path, pictures: torch.Tensor, captions: list[Caption], right: torch.Tensor) -> None:
    """A PNG of up to 48 pictures, each over its caption's character; framed red where bool `right` [n] is False."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font_path = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    font, small = ImageFont.truetype(font_path, 18), ImageFont.truetype(font_path, 15)
    count, side, margin, frame = min(GRID_SAMPLES, len(captions)), SIZE * GRID_SCALE, 14, 4
    width, height, legend = side + margin, side + margin + 26, 36
    rows = -(-count // GRID_COLUMNS)
    sheet = Image.new("RGB", (GRID_COLUMNS * width + margin, rows * height + margin + legend), PAPER)
    canvas = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, GRID_COLUMNS)
        x, y = margin + column * width, margin + row * height
        ink = INK if right[index] else RED
        if not right[index]:
            canvas.rectangle([x - frame, y - frame, x + side + frame - 1, y + side + frame - 1], fill=RED)
        pixels = (pictures[index] * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        letter = CHARACTERS[captions[index].character]
        canvas.text((x + side / 2, y + side + 18), letter, fill=ink, font=font, anchor="mm")
    wrong = int((~right[:count]).sum())
    text = f"below each: its caption's character; red: read as another character, shape or colour ({wrong} of {count})"
    canvas.text((margin, rows * height + margin + legend / 2 - 6), text, fill=INK, font=small, anchor="lm")
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def measure(scores: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
    """`{name}_accuracy`, `{name}_accuracy_low` and `{name}_accuracy_high` of each bool [n] in `scores`."""
    result = {}
    for name, right in scores.items():
        low, high = bootstrap_interval(right, seed)
        share = right.double().mean().item()
        result |= {f"{name}_accuracy": share, f"{name}_accuracy_low": low, f"{name}_accuracy_high": high}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="file that ppcl_engine.demo.train wrote")
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args()
    start = time.monotonic()
    model, codec = load_teacher(options.teacher)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003)
    captions = random_captions(options.captions, generator)
    texts = [caption.text() for caption in captions]
    progress = partial(print, flush=True)
    pictures = draw(model, codec, texts, options.seed, options.steps, options.guidance, progress)
    readings = read(load_reader(), pictures)
    scores = score(readings, captions)
    report = {
        "captions": options.captions,
        "guidance": options.guidance,
        "steps": options.steps,
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(scores, options.seed),
        "confusions": confusions(readings, captions),
    }
    write_json(options.output / "teacher_accuracy.json", report)
    write_grid(options.output / "teacher_grid.png", pictures, captions, torch.stack(list(scores.values())).all(dim=0))
    print(f"{'':<12}{'accuracy':>10}{'95 % interval':>20}")
    for name in scores:
        share, low, high = (report[f"{name}_accuracy{end}"] for end in ("", "_low", "_high"))
        print(f"{name:<12}{share:>10.1%}{f'{low:.1%} to {high:.1%}':>20}")


if __name__ == "__main__":
    main()
