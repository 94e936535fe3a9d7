"""NaN and infinity are never written: not by a training, not by a stage on damaged weights, not as
JSON."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ppcl_engine
from ppcl_engine.algorithms.distillation.trainer import Diverged, Trainer, Training, saved_weights
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.system.atomic import write_json
from ppcl_engine.system.finite import is_finite
from ppcl_engine.system.json_text import json_text
from ppcl_engine.system.tensor_files import (
    TensorEntry,
    TensorFile,
    write_tensor_stream,
    write_tensors,
)

from ..tiny.trained_run import write_parts

ROOT = Path(ppcl_engine.__file__).parent
IN_MEMORY = {
    "json_text",
    "tensor_files",
    "hashes",
    "reader",
    "schemas",
    "teacher_hashes",
    "train",
}
"""Files that may call json.dumps: on whole numbers and text, or on what they read from a file just
now."""
ROUNDS = {"rounds": 2, "updates": 2, "warm_up": 0}
STEPS = {"steps": 4, "save_every": 1, "warm_up": 0}
TRAININGS = {
    "distill-depth": (
        distill_depth,
        DistillDepthConfig,
        {**ROUNDS, "intervals": "1-2"},
        "depth/1-2.safetensors",
    ),
    "distill-width": (
        distill_width,
        DistillWidthConfig,
        {**ROUNDS, "sites": "ffn_text:0"},
        "width/0.ffn_text.safetensors",
    ),
    "polish": (polish, PolishConfig, STEPS, "polished/state.safetensors"),
    "finetune": (
        finetune,
        FinetuneConfig,
        {**STEPS, "variant": "small"},
        "tuned/small_tuned.safetensors",
    ),
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(dtype, value):
    for place in (0, 7, 999):
        tensor = torch.zeros(1000)
        tensor[place] = value
        assert is_finite(torch.zeros(1000).to(dtype)) and not is_finite(tensor.to(dtype))
    assert (
        is_finite(torch.empty(0)) and is_finite(torch.tensor([True])) and is_finite(torch.tensor(3))
    )
    assert not is_finite(torch.tensor([0.0, math.nan]).to(torch.float8_e4m3fn))


def test_a_file_is_not_replaced_by_one_that_is_not_finite(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"kept": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"a.safetensors: second is not finite \(NaN or infinity\); it was not written",
    ):
        write_tensors(path, {"first": torch.ones(2), "second": torch.tensor([1.0, math.nan])})
    large = TensorEntry("large", torch.float16, (1,), lambda: torch.tensor([1e6]))
    with pytest.raises(ValueError, match="large is not finite"):  # in the precision of the file
        write_tensor_stream(path, [large])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_tensors(path, {"curve": torch.tensor([1.0, math.nan])}, gaps=True)


@pytest.fixture
def trainer():
    torch.manual_seed(0)
    return Trainer(torch.nn.Linear(2, 2), weight_decay=0.0)


def step(trainer: Trainer) -> None:
    trainer.update(trainer.module(torch.ones(2)).square().sum(), 0.1, "here")


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
def test_weights_and_moments_are_looked_at_before_a_save(tmp_path, trainer, what):
    path = tmp_path / "x.safetensors"
    step(trainer)
    trainer.save(path, "{}")
    before = path.read_bytes()
    step(trainer)
    weight = trainer.module.weight
    (weight.data if what == "weight" else trainer.optimizer.adamw.state[weight][what])[1, 1] = (
        math.inf
    )
    with pytest.raises(
        Diverged,
        match=r"weight is not finite at step 2 of x; the last good state \(step 1\) is kept",
    ):
        trainer.save(path, "{}")
    assert path.read_bytes() == before


def test_without_a_save_nothing_is_said_to_be_kept(tmp_path, trainer):
    trainer.module.weight.data.fill_(math.nan)
    with pytest.raises(Diverged, match="loss is nan at step 0 of here; nothing was saved"):
        step(trainer)
    with pytest.raises(Diverged, match="nothing was saved"):
        trainer.save(tmp_path / "x.safetensors", "{}")
    assert not list(tmp_path.iterdir())


def test_a_training_that_an_earlier_version_kept_is_refused(tmp_path, trainer):
    path = tmp_path / "x.safetensors"
    step(trainer)
    trainer.save(path, "{}")
    save_file(
        {**load_file(path), "weight.bias": torch.full((2,), math.inf)},
        path,
        {"step": "1", "settings": "{}"},
    )
    with pytest.raises(
        ValueError, match="x.safetensors: weight.bias is not finite .* remove the file, lower"
    ):
        trainer.restore(path)
    with pytest.raises(
        ValueError, match="x.safetensors: bias is not finite .* run distill-depth again"
    ):
        saved_weights(path)


@pytest.mark.parametrize("stage", TRAININGS)
def test_every_training_keeps_its_last_good_state(
    tmp_path, teacher_file, make_run, monkeypatch, stage
):
    """Weights go to infinity in the update after the first save, as with a rate that is far too
    high."""
    work, kind, settings, name = TRAININGS[stage]
    run = Run(make_run(tmp_path, teacher_file))
    write_parts(run, teacher_file)
    path = run.folder / name
    if not stage.startswith(("polish", "finetune")):
        path.unlink()
    update, stepped = torch.optim.AdamW.step, []
    finish, steps = Training.finish_step, []

    def remembered(self, *arguments, **named):
        stepped.append(self)
        return update(self, *arguments, **named)

    def exploding(self, *arguments):
        finish(self, *arguments)
        steps.append(1)
        if len(steps) == (2 if "save_every" in settings else 4):  # the second save is due
            for parameter in stepped[-1].param_groups[0]["params"]:
                parameter.data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", remembered)
    monkeypatch.setattr(Training, "finish_step", exploding)
    good = 1 if "save_every" in settings else 2
    with pytest.raises(
        Diverged,
        match=rf"is not finite at step {2 * good} of .*; the last good state \(step {good}\) is kept",
    ):
        work(kind(model=teacher_file, run=run.folder, device="cpu", **settings))
    file = TensorFile(path)
    assert file.metadata["step"] == str(good) and all(
        t.isfinite().all() for t in file.read_all().values()
    )


def test_json_never_holds_what_is_no_number(tmp_path):
    assert json.loads(json_text({"a": [1.5, None]}, indent=1)) == {"a": [1.5, None]}
    path = tmp_path / "a.json"
    write_json(path, {"variants": []})
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(
            ValueError, match=rf"variants\[1\].damage is {value}, which JSON cannot hold"
        ):
            write_json(path, {"variants": [{"damage": 0.5}, {"damage": value}]})
    assert json.loads(path.read_text()) == {"variants": []}


def test_a_plan_never_holds_what_is_no_number(tmp_path, teacher_file, make_run):
    plan = write_parts(Run(make_run(tmp_path, teacher_file)), teacher_file)
    wrong = plan.with_parts(variants=(Variant(name="small", damage=math.nan),))
    with pytest.raises(ValueError, match=r"variants\[0\].damage is nan, which JSON cannot hold"):
        wrong.to_json()


def test_one_file_makes_json():
    making = {
        path.stem
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump")
    }
    assert "json_text" in making and making <= IN_MEMORY
