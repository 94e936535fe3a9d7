"""Let a teacher draw captions, and count what the reader recognises in its pictures.

`python -m ppcl_engine.demo.accuracy --teacher teacher.safetensors --output DIR` writes
DIR/teacher_accuracy.json and DIR/teacher_grid.png.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch

from ..algorithms.resampling import share_estimate
from ..data.codecs import open_codec
from ..data.rendered.captions import (
    CHARACTERS,
    COLOUR_NAMES,
    FIELDS,
    SHAPES,
    SIZE,
    Caption,
    caption_table,
    random_captions,
)
from ..data.rendered.reader import load_reader, read, score
from ..data.sampling import draw_prompts, encode_prompts
from ..models.opening import open_model
from ..models.weights import Weights
from ..system.atomic import replacing, write_json
from ..system.seeds import draw_generator

CHUNK = 50  # captions drawn together
GRID_SAMPLES, GRID_COLUMNS, GRID_SCALE = 48, 12, 2
RED, INK, PAPER = (205, 30, 30), (30, 30, 30), (255, 255, 255)


def confusions(readings: torch.Tensor, captions: list[Caption]) -> list[dict]:
    """What the reader took for something else, most frequent first: {"field", "caption", "read",
    "count"}."""
    names = (CHARACTERS, COLOUR_NAMES, SHAPES, COLOUR_NAMES, COLOUR_NAMES)
    table = caption_table(captions)
    pairs = Counter(
        (FIELDS[column], names[column][table[row, column]], names[column][readings[row, column]])
        for row, column in (readings != table).nonzero().tolist()
    )
    return [
        dict(zip(("field", "caption", "read", "count"), (*key, n), strict=True))
        for key, n in pairs.most_common()
    ]


def write_grid(
    path: Path, pictures: torch.Tensor, captions: list[Caption], right: torch.Tensor
) -> None:
    """Writes a PNG of up to 48 pictures, each above its caption's character. right: bool [n]; pictures
    for which it is False get a red frame."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font_path = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    font, small = ImageFont.truetype(font_path, 18), ImageFont.truetype(font_path, 15)
    count, side, margin, frame = min(GRID_SAMPLES, len(captions)), SIZE * GRID_SCALE, 14, 4
    width, height, legend = side + margin, side + margin + 26, 36
    rows = -(-count // GRID_COLUMNS)
    sheet = Image.new(
        "RGB", (GRID_COLUMNS * width + margin, rows * height + margin + legend), PAPER
    )
    canvas = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, GRID_COLUMNS)
        x, y = margin + column * width, margin + row * height
        ink = INK if right[index] else RED
        if not right[index]:
            canvas.rectangle(
                [x - frame, y - frame, x + side + frame - 1, y + side + frame - 1], fill=RED
            )
        pixels = (pictures[index] * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        letter = CHARACTERS[captions[index].character]
        canvas.text((x + side / 2, y + side + 18), letter, fill=ink, font=font, anchor="mm")
    wrong = int((~right[:count]).sum())
    text = f"below each: its caption's character; red: read as another character, shape or colour ({wrong} of {count})"
    canvas.text(
        (margin, rows * height + margin + legend / 2 - 6), text, fill=INK, font=small, anchor="lm"
    )
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def measure(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """`{name}_accuracy`, `{name}_accuracy_low` and `{name}_accuracy_high` of each bool [n] in
    `scores`."""
    result = {}
    for name, right in scores.items():
        estimate = share_estimate(right)
        result |= {
            f"{name}_accuracy": estimate["value"],
            f"{name}_accuracy_low": estimate["low"],
            f"{name}_accuracy_high": estimate["high"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--teacher", type=Path, required=True, help="file that ppcl_engine.demo.train wrote"
    )
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args()
    start = time.monotonic()
    weights, codec = Weights(options.teacher), open_codec(options.teacher)
    model = open_model(options.teacher)
    generator = draw_generator(options.seed)
    captions = random_captions(options.captions, generator)
    prompts = encode_prompts(codec, [caption.text() for caption in captions])
    sampling = (options.seed, options.steps, options.guidance, CHUNK, "draw")
    pictures = codec.pictures(draw_prompts(weights.architecture, model, prompts, *sampling))
    readings = read(load_reader(), pictures)
    scores = score(readings, captions)
    report = {
        "captions": options.captions,
        "guidance": options.guidance,
        "steps": options.steps,
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(scores),
        "confusions": confusions(readings, captions),
    }
    write_json(options.output / "teacher_accuracy.json", report)
    write_grid(
        options.output / "teacher_grid.png",
        pictures,
        captions,
        torch.stack(list(scores.values())).all(dim=0),
    )
    print(f"{'':<12}{'accuracy':>10}{'95 % interval':>20}")
    for name in scores:
        share, low, high = (report[f"{name}_accuracy{end}"] for end in ("", "_low", "_high"))
        print(f"{name:<12}{share:>10.1%}{f'{low:.1%} to {high:.1%}':>20}")


if __name__ == "__main__":
    main()
