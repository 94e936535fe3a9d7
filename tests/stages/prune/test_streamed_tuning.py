"""polish and finetune with one block at a time: the bits of all blocks in memory, for every
architecture, wherever parts wait and whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from ppcl_engine.algorithms.distillation import trainer as training
from ppcl_engine.algorithms.distillation.part_store import PartStore
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import FinetuneConfig, PolishConfig
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish

from ...tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ...tiny.processes import exit_code
from ...tiny.sd35_parts import SD35_PARTS
from ...tiny.trained_run import files_of, write_parts

SIZES = {"flux1": FLUX_DEPTH, "sd35": {"num_layers": 8}}
PARTS = {"flux1": FLUX_PARTS, "sd35": SD35_PARTS}
STAGES = {
    "polish": (polish, PolishConfig, {"steps": 3, "all_on": 0.3}, "polished"),
    "finetune": (
        finetune,
        FinetuneConfig,
        {"variant": "smallest", "steps": 2, "data": 0.5},
        "tuned",
    ),
}
EVERY_ARCHITECTURE = pytest.mark.parametrize(
    "architecture", ["qwen_image", "flux1", "sd35"], indirect=True
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, architecture, make_model, save_model, make_run, calibration_of):
    """(teacher, a run with parts of every kind that nobody trained)"""
    folder, name = tmp_path_factory.mktemp("begun"), architecture.name
    teacher = save_model(folder / "teacher.safetensors", make_model(**SIZES.get(name, {})))
    calibration = calibration_of(teacher, batches=2, samples=2)
    run = Run(make_run(folder / "run", teacher, calibration))
    write_parts(run, teacher, parts=PARTS.get(name))
    return teacher, run


@pytest.fixture
def trained(begun, tmp_path):
    """What a stage leaves in a new copy of the run, or in one that is there."""

    def train(stage: str, name: str = "run", **settings) -> dict[str, bytes]:
        function, kind, tiny, folder = STAGES[stage]
        teacher, run = begun[0], Run(tmp_path / name)
        if not run.folder.exists():
            shutil.copytree(begun[1].folder, run.folder)
        common = {"model": teacher, "run": run.folder, "device": "cpu", "warm_up": 1}
        function(kind(**{**common, "learning_rate": 2e-3, "save_every": 2, **tiny, **settings}))
        return files_of(run, f"{folder}/**/*.safetensors", "plan.json")

    return train


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "dtype, offload, state", [("float32", "memory", "float32"), ("bfloat16", "disk", "compact")]
)
def test_one_block_at_a_time_is_the_same_bits(
    trained, monkeypatch, tmp_path, stage, dtype, offload, state
):
    """Also on rounded weights, of which the second half of the steps makes use."""
    monkeypatch.setattr(training, "PLAIN_SHARE", 0.5)
    settings = {"dtype": dtype, "quant_aware": "int8", "optimizer_state": state}
    resident = trained(stage, "resident", checkpointing=offload == "disk", **settings)
    streamed = trained(stage, "streamed", streamed=True, offload=offload, **settings)
    assert streamed.keys() == resident.keys() and len(resident) > 1
    assert [name for name in resident if streamed[name] != resident[name]] == []
    assert not list(tmp_path.rglob("part_*")) and not list(tmp_path.rglob("state_*"))


def killed_in_third_sweep(train, parts: int) -> int:
    """The exit code of a process that is killed when it has put back one part of its third step."""
    child = os.fork()
    if child:
        return exit_code(child)
    put, done = PartStore.put, []

    def putting(self, part, kind, tensors):
        put(self, part, kind, tensors)
        done.extend([part] if kind == "state" else [])
        if len(done) > 2 * parts:
            os.kill(os.getpid(), signal.SIGKILL)

    PartStore.put = putting
    try:
        train()
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    "state, goes_on", [("float32", {"streamed": True, "offload": "disk"}), ("compact", {})]
)
def test_killed_in_a_backward_sweep_is_the_same_bits(trained, tmp_path, state, goes_on):
    """What the killed process left on disk is not used: training goes on from its last save, also
    with all blocks in memory."""
    settings, places = {"steps": 4, "optimizer_state": state}, 4
    whole = trained("finetune", "whole", **settings)
    killed = killed_in_third_sweep(
        lambda: trained("finetune", "halted", streamed=True, offload="disk", **settings), places
    )
    assert killed == -signal.SIGKILL
    folder = tmp_path / "halted"
    assert list(folder.rglob("part_*")) and not files_of(Run(folder), "tuned/*.partial")
    assert trained("finetune", "halted", **settings, **goes_on) == whole
    assert not list(folder.rglob("part_*"))
