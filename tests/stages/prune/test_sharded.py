"""polish and finetune with their weights divided among processes: what one process gives, within
float tolerance, and files that any number of processes goes on from."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import accelerate  # noqa: F401  imported here, the forked processes need not
import pytest
import torch
import torch.distributed.tensor  # noqa: F401
from torch.distributed.fsdp import FSDPModule

from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.algorithms.distillation.part_optimizer import PartOptimizer
from ppcl_engine.algorithms.distillation.sharded_walk import check_torch
from ppcl_engine.algorithms.distillation.sharding import local
from ppcl_engine.algorithms.distillation.tuning import AveragedTrainer
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import FinetuneConfig, PolishConfig
from ppcl_engine.stages import run_stage
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.system import distributed
from ppcl_engine.system.distributed import Processes
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.processes import Launched, command, relative
from ...tiny.trained_run import killed, stop_after

TOLERANCE = 1e-4  # of every tensor, relative, after all updates
TINY = {"steps": 3, "learning_rate": 2e-3, "warm_up": 1, "save_every": 2, "device": "cpu"}


def trained(run: Run, teacher_file: Path, *stages: str, streamed: bool = False) -> None:
    """polish rounds weights and keeps the teacher in memory; finetune may read it block by block."""
    common = {"model": teacher_file, "run": run.folder, **TINY}
    configs = {
        "polish": PolishConfig(**common, quant_aware="int8"),
        "finetune": FinetuneConfig(**common, variant="smallest", streamed=streamed),
    }
    for stage in stages:
        run_stage(stage, configs[stage])


def difference(run: Run, other: Run, folder: str) -> float:
    paths = sorted((other.folder / folder).rglob("*.safetensors"))
    assert paths and len(paths) == len(list((run.folder / folder).rglob("*.safetensors")))
    found = []
    for path in paths:
        ours, theirs = (TensorFile(p) for p in (run.folder / path.relative_to(other.folder), path))
        assert ours.keys() == theirs.keys() and ours.metadata.keys() == theirs.metadata.keys()
        found += [relative(ours.read(n), theirs.read(n)) for n in theirs.keys()]
    return max(found)


def kept_by(trainer: AveragedTrainer) -> list[int]:
    """Numbers that this process keeps, and those of the whole training."""
    parts = (trainer.tensors(part, Path("kept")) for part in trainer.walk.names)
    tensors = [tensor for part in parts for tensor in part.values()]
    return [sum(local(t).numel() for t in tensors), sum(t.numel() for t in tensors)]


def norms_of_parts(monkeypatch) -> list[float]:
    """Grows by the norm of each part's gradient before it is clipped, in every step."""
    clip, norms = PartOptimizer.clip, []

    def watched(optimizer: PartOptimizer) -> float:
        norms.append(clip(optimizer))
        return norms[-1]

    monkeypatch.setattr(PartOptimizer, "clip", watched)
    return norms


@pytest.mark.parametrize("given", [{"offload": "disk"}, {"optimizer_state": "compact"}])
def test_shards_that_would_be_kept_otherwise_are_refused_before_anything_is_loaded(tmp_path, given):
    common = {"model": tmp_path / "none", "run": tmp_path, "streamed": True, **given}
    said = "^--(offload disk|optimizer-state compact): .* leave it out, or use --parallel data"
    with distributed._working(Processes(count=2, share="shard")):
        with pytest.raises(ValueError, match=said):
            polish(PolishConfig(**common))
        with pytest.raises(ValueError, match=said):
            finetune(FinetuneConfig(**common, variant="all"))


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(ValueError, match="--parallel shard needs a newer torch than"):
        check_torch()


def test_two_processes_give_what_one_gives(tmp_path, parts_run, teacher_file, monkeypatch):
    """One polishes, and goes on with a fine-tuning that one process began; then one of two is
    killed, and one process goes on with what they saved."""
    alone, launched, stopped = (parts_run(name) for name in ("alone", "launched", "stopped"))
    with monkeypatch.context() as context, pytest.raises(SystemError):
        stop_after(context, 3, killed)
        trained(launched, teacher_file, "finetune")
    norms = norms_of_parts(monkeypatch)
    trained(alone, teacher_file, "finetune", "polish")
    expected = list(norms)

    def both() -> int:
        update = AveragedTrainer.update

        def watched(trainer, *arguments):
            update(trainer, *arguments)
            name = f"{type(trainer.walk.module).__name__}_{os.environ['RANK']}.json"
            (tmp_path / name).write_text(json.dumps(kept_by(trainer)))

        AveragedTrainer.update = watched
        trained(launched, teacher_file, "finetune", "polish", streamed=True)
        found = norms[len(expected) :]
        (tmp_path / f"norms_{os.environ['RANK']}").write_text(json.dumps(found))
        return 0

    launch = Launched(tmp_path / "both", 2, both)
    assert launch.codes() == [0, 0], [p.read_text()[-3000:] for p in launch.outputs]
    assert not launch.lines("ppcl") and all("Warning" not in p.read_text() for p in launch.outputs)
    assert difference(launched, alone, "tuned") < TOLERANCE
    assert difference(launched, alone, "polished") < TOLERANCE
    damage, same = (r.load_plan().variant("smallest_tuned").damage for r in (launched, alone))
    assert damage == pytest.approx(same, rel=TOLERANCE)
    found, other = (json.loads((tmp_path / f"norms_{rank}").read_text()) for rank in (0, 1))
    assert found == other == pytest.approx(expected[-len(found) :], rel=TOLERANCE)
    assert max(found) > 1 > min(found)  # some are shortened, others are not
    shares = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(shares) == 4 and all(0.45 < here / whole < 0.55 for here, whole in shares)

    def end() -> None:
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"model": teacher_file, "run": stopped.folder, **TINY, "variant": "smallest"}
    arguments = [x for n, v in options.items() for x in (f"--{n.replace('_', '-')}", str(v))]
    arguments = ["finetune", *arguments, "--checkpointing"]
    with monkeypatch.context() as context:
        stop_after(context, 3, end)
        launch = command(tmp_path / "killed", 2, *arguments)
        assert launch.codes() == [USER_ERROR, -signal.SIGKILL]
    (line,) = launch.lines()
    assert "another process has ended, so this one ends too; what was saved is kept" in line
    assert TensorFile(stopped.tuned_variant("smallest_tuned")).metadata["step"] == "2"
    assert main(arguments) == 0
    assert difference(stopped, alone, "tuned") < TOLERANCE
