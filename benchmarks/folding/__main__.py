"""Modulation folding: sizes of the released models, memory and time at their width, distillation,
pictures of the demo.

sizes: counted on the meta device. memory: a random model of width 3072 and 4 blocks in bf16, each
figure the peak of a fresh process (VmHWM, the libraries' share in it): to fold it, to load it, to
load it and run one forward; folded against not, one run. distil: the same for `distill-depth` on a
folded teacher. pictures: the bundled teacher's variants, same noise.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.settings.prune_settings import DistillDepthConfig
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import TensorFile

from ..shared import output
from ..shared.teachers import (
    BATCHES,
    GRID,
    NARROW,
    SAMPLES,
    TEXT_TOKENS,
    WIDE,
    intervals,
    origin,
    peak_bytes,
    random_teacher,
)
from .pictures import pictures
from .sizes import model_sizes

FULL_WIDTH = {**WIDE, "num_attention_heads": 24, "joint_attention_dim": 3584, "num_layers": 4}
FORMS = ("off", "table", "basis")
RANK, STEPS = 32, 8
FORWARD = {"grid": (1, 16, 16), "text": 64}
REPEATS = 3


@dataclass(frozen=True)
class Scale:
    wide: dict
    distil: dict
    fresh: bool
    captions: int
    steps: int


FULL = Scale(FULL_WIDTH, {**WIDE, "num_layers": 15}, fresh=True, captions=24, steps=20)
QUICK = Scale(
    {**NARROW, "num_layers": 2}, {**NARROW, "num_layers": 6}, fresh=False, captions=2, steps=2
)


def child(what: str, *arguments: str) -> dict:
    """One measurement in this process."""
    start = time.perf_counter()
    found = {"fold": _fold, "load": _load, "distil": _distil, "imports": _imports}[what](*arguments)
    return {"peak": peak_bytes(), "seconds": round(time.perf_counter() - start, 2), **(found or {})}


def _imports() -> None:
    from diffusers import QwenImageTransformer2DModel  # noqa: F401


def _fold(path: str, form: str, folder: str, rank: str) -> None:
    fold(
        FoldConfig(
            path=Path(path),
            form=form,
            run=Path(folder),
            name=form,
            rank=int(rank) if form == "basis" else None,
            steps=str(STEPS),
            samples="1",
            device="cpu",
        )
    )


def _load(path: str, forwards: str) -> dict:
    """The peak after loading, and after a forward; seconds of one (median)."""
    from ppcl_engine import open_model

    model, architecture = open_model(path, dtype=torch.bfloat16), QwenImage()
    loaded = peak_bytes()
    inputs = architecture.random_inputs(
        Weights(Path(path)).config, 1, FORWARD["grid"], FORWARD["text"], "cpu"
    )
    inputs |= {name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    seconds = []
    for _ in range(int(forwards)):
        start = time.perf_counter()
        with torch.no_grad():
            architecture.call(model, {**inputs, "timestep": torch.tensor([1 - 1 / STEPS])})
        seconds.append(time.perf_counter() - start)
    return {
        "loaded": loaded,
        "forward_seconds": sorted(seconds)[len(seconds) // 2] if seconds else None,
    }


def _distil(path: str, folder: str, streamed: str) -> None:
    from ppcl_engine.stages.prune.distill_depth import distill_depth

    distill_depth(
        DistillDepthConfig(
            model=Path(path),
            run=Path(folder),
            streamed=bool(int(streamed)),
            device="cpu",
            rounds=1,
            updates=4,
        )
    )


def measured(scale: Scale, what: str, *arguments: object) -> dict:
    """`child` in a fresh process (quick runs: in this one, whose peak then means nothing)."""
    texts = [str(argument) for argument in arguments]
    if not scale.fresh:
        return child(what, *texts)
    command = [sys.executable, "-m", "benchmarks.folding", "--child", what, *texts]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def memory(scale: Scale, folder: Path) -> dict:
    """{"block": bytes, "fold": {form: peak, seconds}, "forms": {form: peaks, bytes of the file}}"""
    path = folder / "wide.safetensors"
    random_teacher(path, scale.wide, seed=0, dtype=torch.bfloat16)
    weights = Weights(path)
    prefix = weights.architecture.block_prefix(weights.config, 0)
    block = 2 * sum(
        math.prod(weights.shape(key)) for key in weights.keys() if key.startswith(prefix)
    )
    rank = min(RANK, weights.architecture.width(weights.config) // 4)
    folds, forms = {}, {}
    for form in FORMS[1:]:
        folds[form] = measured(scale, "fold", path, form, folder, rank)
        print(
            f"fold as {form}: {folds[form]['peak'] / 1e6:.0f} MB, {folds[form]['seconds']} s",
            flush=True,
        )
    for form in FORMS:
        file = path if form == "off" else folder / "exports" / f"{form}.safetensors"
        row = measured(scale, "load", file, REPEATS)
        held = sum(
            math.prod(TensorFile(file).shape(n)) * TensorFile(file).dtype(n).itemsize
            for n in TensorFile(file).keys()
        )
        forms[form] = {
            **row,
            "bytes": held,
            "parameters": sum(math.prod(Weights(file).shape(k)) for k in Weights(file).keys()),
        }
        print(
            f"{form}: loaded {row['loaded'] / 1e6:.0f} MB, forward {row['peak'] / 1e6:.0f} MB",
            flush=True,
        )
        (file if form != "off" else folder / "nothing").unlink(missing_ok=True)
    path.unlink()
    return {
        "width": weights.architecture.width(weights.config),
        "blocks": weights.num_blocks,
        "block_bytes": block,
        "rank": rank,
        "steps": STEPS,
        "fold": folds,
        "forms": forms,
    }


def prepare_run(folder: Path, model: Path) -> Path:
    """Calibration and plan of this teacher."""
    weights = Weights(model)
    torch.manual_seed(0)
    batches = [
        QwenImage().random_inputs(weights.config, SAMPLES, GRID, TEXT_TOKENS, "cpu")
        for _ in range(BATCHES)
    ]
    for batch in batches:
        batch["clean"] = torch.randn_like(batch["hidden_states"])
    run = Run(folder)
    save_calibration(run.calibration, CalibrationSet(batches, origin(weights)))
    plan = PruningPlan(
        architecture="qwen_image",
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=intervals(weights.num_blocks),
    )
    write_text(run.plan, plan.to_json())
    return folder


def distil(scale: Scale, folder: Path) -> dict:
    """{form: {"streamed": peak, "resident": peak, "trained_bytes": weights and two moments of one
    student}}"""
    plain = folder / "plain.safetensors"
    random_teacher(plain, scale.distil, seed=0)
    rank = min(RANK, QwenImage().width(scale.distil) // 4)
    folded = fold(
        FoldConfig(path=plain, form="basis", rank=rank, run=folder, name="teacher", device="cpu")
    )
    found = {}
    for form, model in (("off", plain), ("basis", folded)):
        found[form] = {}
        for mode in ("streamed", "resident"):
            run = prepare_run(folder / f"{form}_{mode}", model)
            row = measured(scale, "distil", model, run, int(mode == "streamed"))
            found[form] |= {mode: row["peak"], f"{mode}_seconds": row["seconds"]}
            file = TensorFile(next(Run(run).students.glob("*.safetensors")))
            found[form]["trained_bytes"] = 4 * sum(math.prod(file.shape(n)) for n in file.keys())
            print(f"distil on {form}, {mode}: {row['peak'] / 1e6:.0f} MB", flush=True)
    return {
        "width": QwenImage().width(scale.distil),
        "blocks": scale.distil["num_layers"],
        "rank": rank,
        **found,
    }


def show(values: dict) -> None:
    rows = []
    for name, row in values["sizes"].items():
        cells = [
            f"{row[key]['parameters']:,}" for key in ("off", "table_8", "table_50", "basis_32")
        ]
        rows.append(
            [
                name,
                *cells,
                f"{100 * (1 - row['table_8']['parameters'] / row['off']['parameters']):.1f} %",
            ]
        )
    output.print_table(
        "parameters",
        ["model", "off", "table of 8", "table of 50", "basis of rank 32", "saved"],
        rows,
    )
    tables = (
        values["sizes"]["Qwen-Image, 60 blocks"][f"table_{steps}"]["maps"] / 1e6
        for steps in (8, 20, 50)
    )
    print(
        "a table of the full model, 8, 20 and 50 steps, MB:",
        ", ".join(f"{size:.0f}" for size in tables),
    )
    found = values["memory"]
    rows = [
        [
            form,
            f"{r['bytes'] / 1e9:.3f}",
            f"{r['loaded'] / 1e9:.3f}",
            f"{r['peak'] / 1e9:.3f}",
            f"{r['forward_seconds']:.2f}",
        ]
        for form, r in found["forms"].items()
    ]
    heads = ["form", "weights GB", "peak of load GB", "with a forward GB", "seconds a forward"]
    output.print_table(f"width {found['width']}, {found['blocks']} blocks, bf16", heads, rows)
    libraries = values["imports"]
    for form, row in found["fold"].items():
        above = (row["peak"] - libraries) / found["block_bytes"]
        print(f"fold as {form}: {row['peak'] / 1e6:.0f} MB, {above:.2f} blocks above the libraries")
    rows = [
        [
            form,
            *(
                f"{values['distil'][form][key] / 1e6:.0f} MB"
                for key in ("streamed", "resident", "trained_bytes")
            ),
        ]
        for form in ("off", "basis")
    ]
    output.print_table(
        "distil depth",
        ["teacher and students", "streamed", "resident", "a student's training state"],
        rows,
    )
    heads = [
        "variant",
        "parameters",
        "table: same bits",
        "basis: PSNR dB",
        "characters",
        "table",
        "basis",
    ]
    rows = [
        [
            r["name"],
            f"{r['parameters']['off']:,}",
            r["identical"],
            f"{r['psnr']:.1f}",
            *(f"{100 * r['characters'][form]:.1f} %" for form in FORMS),
        ]
        for r in values["pictures"]["variants"]
    ]
    output.print_table("pictures of the demo", heads, rows)


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("folding", __doc__)
    parser.add_argument(
        "--folder", type=Path, help="where temporary files go (8 GB; on a disk, not in memory)"
    )
    chosen = output.parse(parser, arguments)
    scale = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="ppcl_folding_") as name:
        values = {
            "sizes": model_sizes(),
            "imports": measured(scale, "imports")["peak"],
            "memory": memory(scale, Path(name)),
            "distil": distil(scale, Path(name)),
            "pictures": pictures(Path(name), chosen.output, scale.captions, scale.steps),
        }
    show(values)
    return output.write("folding", chosen, values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
    else:
        main()
