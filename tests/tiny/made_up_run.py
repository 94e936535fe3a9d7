"""A made-up run folder for reports: nothing is trained, names and captions hold what must be
escaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import torch

from ppcl_engine.plan import Interval, PruningPlan, Variant
from ppcl_engine.system.atomic import write_json, write_text
from ppcl_engine.system.tensor_files import write_tensors

CAPTIONS = ["<script>alert(1)</script>", 'five $dollars$ & "quotes" 一只猫 \\frac{']
BLOCKS, LONGEST, SAMPLES = 6, 4, 5
ACCURACIES = ("character_accuracy", "shape_accuracy", "colour_accuracy")
INTERVALS = ((1, 2),), ((1, 2), (3, 5))
SMALL = "small & <b>"


def stat(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def evaluated(name: str, parameters: int, reader: bool, teacher: bool) -> dict:
    row = {
        "name": name,
        "parameters": parameters,
        "bytes": 2 * parameters,
        "flops": 1e9 * parameters,
    }
    row |= {
        "seconds_per_step": 0.02,
        "latency_ratio": 1.0,
        "peak_memory_bytes": 10**8,
        "text_sensitivity": stat(0.2),
    }
    for field in ("velocity_error", "latent_psnr", "psnr", "ssim"):
        row[field] = None if teacher else stat(0.5)
    row["velocity_error_by_timestep"] = (
        None if teacher else [{"t": t, **stat(0.1)} for t in (0.25, 0.75)]
    )
    return row | {name: stat(0.97) if reader else None for name in ACCURACIES}


def make_run(folder: Path, intervals=INTERVALS[0], reader=False, bootstrap=3) -> Path:
    _write_plan(folder, intervals)
    _write_detection(folder, intervals, bootstrap)
    _write_evaluation(folder, reader)
    return folder


def _write_plan(folder: Path, intervals) -> None:
    parts = tuple(
        Interval(first=u, last=v, score=0.1, stability=0.5, parameters=900) for u, v in intervals
    )
    names = tuple(i.name for i in parts)
    plan = PruningPlan(
        architecture="qwen_image",
        config={"num_layers": BLOCKS},
        num_blocks=BLOCKS,
        fingerprint="f" * 64,
        intervals=parts,
        variants=(
            Variant(name="full", parameters=5000),
            Variant(name=SMALL, intervals=names, parameters=4000),
        ),
        provenance={
            "tool": "ppcl",
            "source_model": "<i>model</i>",
            "calibration": "c" * 64,
            "seed": 0,
        },
    )
    write_text(folder / "plan.json", plan.to_json())
    for name in names:
        write_tensors(folder / "depth" / f"{name}.safetensors", {"losses": torch.rand(50)})


def _write_detection(folder: Path, intervals, bootstrap: int) -> None:
    pairs = torch.arange(BLOCKS)[:, None] + torch.arange(LONGEST) < BLOCKS
    pairs[:, 0] = False
    cka = torch.where(pairs[..., None], torch.rand(BLOCKS, LONGEST, 1 + bootstrap), torch.nan)
    error = torch.where(pairs[..., None], torch.rand(BLOCKS, LONGEST, SAMPLES), torch.nan)
    curves = {"cka": cka.double(), "error": error.double(), "power": torch.ones(SAMPLES).double()}
    settings = {"calibration": "c", "longest": LONGEST, "bootstrap": bootstrap}
    about = {"settings": json.dumps(settings)}
    write_tensors(folder / "curves.safetensors", curves, about, gaps=True)
    found = [{"first": u, "last": v, "score": 0.2, "stability": 0.5} for u, v in intervals]
    explained = {"method": "budget", "intervals": found, "explain": ["D > 0.1 & so on"]}
    write_json(folder / "detect.json", explained)


def _write_evaluation(folder: Path, reader: bool) -> None:
    rows = [
        evaluated("full", 5000, reader, teacher=True),
        evaluated(SMALL, 4000, reader, teacher=False),
    ]
    about = {"captions": 2, "steps": 4, "guidance": 2.0, "seed": 0, "seconds": 9.5, "device": "cpu"}
    about |= {"machine": "a & b", "versions": {"torch": "2"}, "captions_shown": CAPTIONS}
    write_json(folder / "evaluate.json", {**about, "variants": rows})
    pictures = {row["name"]: torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8) for row in rows}
    write_tensors(folder / "pictures.safetensors", pictures)


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data
