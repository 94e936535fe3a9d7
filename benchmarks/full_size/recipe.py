"""The recipe for a model of 20 B parameters, as README has it, with the fewest steps on tiny pictures.

What a step costs and what is read and kept for it are those of the real thing; how many there are,
and the tokens of a picture, are not. polish, which costs what finetune does, is not in it; finetune takes
one step, on a variant of its own that the disk has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import tuning

CAPTIONS, TEXT_TOKENS, SIDE = 4, 8, 64  # pixels
MOST_REMOVED = 4  # blocks; every student takes 4.3 GB of disk while it is trained
NARROWED = 0.95  # parameters that stay with the width sites on, of those that stay without


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command of the recipe."""

    name: str
    """of its row in the result"""
    arguments: list[str]
    """of `python -m ppcl_engine`; "open_model" is the function"""
    predicted: bool = True
    """whether the dry run knows the stage"""
    leaves: tuple[str, ...] = ()
    """files and folders of the run folder that are removed afterwards, for their size"""
    before: Callable[[], None] = lambda: None
    """what makes ready for it, unmeasured"""


def recipe(model: Path, run: Path, embeddings: Path, blocks: int) -> list[Step]:
    removed = min(MOST_REMOVED, blocks // 3)
    share = NARROWED * (1 - removed / blocks)
    common = ["--model", str(model), "--run", str(run), "--device", "cpu"]
    streamed = [*common, "--dtype", "bfloat16", "--streamed"]
    exported, bundle = run / "exports", run / "exports" / "pruned.ppcl.safetensors"

    def stage(name: str, *settings: str) -> Step:
        return Step(name=name, arguments=[name, *streamed, *settings])

    def export(layout: str, *settings: str, leaves: tuple[str, ...] = ()) -> Step:
        arguments = ["export", *streamed, "--layout", layout, *settings]
        return Step(name=f"export {layout}", arguments=arguments, leaves=leaves)

    def fold(form: str, *settings: str, leaves: tuple[str, ...] = ("fold",)) -> Step:
        where = ["--path", str(model), "--run", str(run / "fold"), "--name", form]
        arguments = ["fold", *where, "--form", form, *settings, "--device", "cpu"]
        return Step(name=f"fold {form}", arguments=arguments, predicted=False, leaves=leaves)

    drawing = f"--samples {CAPTIONS} --batch 2 --steps 2 --height {SIDE} --width {SIDE}".split()
    samples = ["--samples", str(CAPTIONS)]
    training = ["--rounds", "1", "--updates", "4"]
    sparse = ["sparsify", "--path", str(model), "--run", str(run / "sparse"), "--device", "cpu"]
    sparse += ["--dtype", "bfloat16", "--calibration", str(run / "calibration.safetensors")]
    # a tenth of all candidates: the others would take hours
    candidates = ["--kinds", "text ffn_image", "--form", "gated", "--longest", "1"]
    # the maps that stay dense would take 8 minutes a block on two cores
    dense = ["--skip", "mlp mod add_ to_add to_k to_v"]
    return [
        stage("calibrate", "--embeddings", str(embeddings), *drawing),
        stage("probe", "--train-steps", "2"),
        stage("detect", "--longest", "2", "--remove", str(removed), *samples),
        stage("distill-depth", "--correction", "none", *training),
        stage("detect-width", *candidates, "--share", f"{share:.3f}", *samples),
        stage("distill-width", *training),
        stage("variants", *samples),
        export("bundle"),
        Step(name="inspect", arguments=["inspect", "--path", str(bundle)], predicted=False),
        Step(
            name="open_model",
            arguments=["open_model", str(bundle), str(model)],
            predicted=False,
            leaves=("exports",),
        ),
        export("comfyui", "--variant", "small", "--store", "float8", leaves=(exported.name,)),
        fold("table", "--steps", "2", "--height", str(SIDE), "--width", str(SIDE)),
        fold("basis", "--rank", "16", leaves=("fold", "depth", "width", "states")),
        *one_step(model, run),
        Step(
            name="sparsify",
            arguments=[
                *sparse,
                "--score",
                "wanda",
                "--granularity",
                "row",
                "--no-exchange",
                *dense,
                "--streamed",
            ],
            leaves=("sparse",),
        ),
    ]


def one_step(model: Path, run: Path) -> list[Step]:
    """The new block of an interval, one update long, and one step of finetune with it."""
    tuned = run / "tuned"
    common = ["--model", str(model), "--run", str(tuned), "--device", "cpu", "--streamed"]
    common += ["--dtype", "bfloat16"]
    distilled = ["distill-depth", *common, "--correction", "none", "--rounds", "1"]
    finetuned = ["finetune", *common, "--variant", tuning.VARIANT, "--steps", "1", "--ema", "0"]
    return [
        Step(
            name="distill one interval",
            arguments=[*distilled, "--updates", "1"],
            before=partial(tuning.prepare, model, tuned, run / "calibration.safetensors"),
        ),
        Step(
            name="finetune",
            arguments=[*finetuned, "--offload", "disk", "--optimizer-state", "compact"],
            before=partial(tuning.name_variant, tuned),
            leaves=("tuned",),
        ),
    ]
