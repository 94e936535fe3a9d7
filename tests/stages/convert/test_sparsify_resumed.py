"""`ppcl sparsify` that was stopped or killed ends in the same bits."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from ppcl_engine.algorithms.sparsity import blocks
from ppcl_engine.stages.convert import sparsify as stage

from ...tiny.processes import exit_code, forked


@pytest.mark.parametrize("feed", ["pruned", "dense"])
def test_a_run_that_was_stopped_goes_on_at_its_block(sparse, teacher_file, monkeypatch, feed):
    settings = {"score": "obs", "pattern": "2:4", "permute": True, "feed": feed}
    expected = sparse(teacher_file, name="alone", **settings).read_bytes()
    done = []

    def counted(*arguments):
        done.append(arguments[-1])
        if len(done) == 3:
            raise SystemError("killed")
        return blocks.prune_block(*arguments)

    monkeypatch.setattr(stage, "prune_block", counted)
    with pytest.raises(SystemError):
        sparse(teacher_file, name="killed", **settings)
    path = sparse(teacher_file, name="killed", **settings)
    assert done == ["block 0", "block 1", "block 2", "block 2", "block 3", "block 4", "block 5"]
    assert path.read_bytes() == expected


def test_other_settings_begin_again(sparse, teacher_file, monkeypatch):
    expected = sparse(teacher_file, name="alone", sparsity=0.7).read_bytes()
    monkeypatch.setattr(
        stage, "write_sparse", lambda *arguments: (_ for _ in ()).throw(SystemError)
    )
    with pytest.raises(SystemError):
        sparse(teacher_file, sparsity=0.5)
    monkeypatch.undo()
    assert sparse(teacher_file, sparsity=0.7).read_bytes() == expected


def test_kill_at_random_moments_changes_no_bit(sparse, teacher_file, complete_run, tmp_path):
    begun = time.monotonic()
    expected = sparse(teacher_file, name="alone", granularity="row").read_bytes()
    seconds, moments, killed = time.monotonic() - begun, random.Random(0), 0
    while killed < 2:
        arguments = [
            "sparsify",
            "--path",
            teacher_file,
            "--calibration",
            complete_run.calibration,
            "--run",
            tmp_path,
            "--device",
        ]
        arguments += ["cpu", "--store", "float32", "--name", f"killed_{killed}", "--score", "wanda"]
        arguments += ["--granularity", "row", "--no-exchange", "--no-compensate"]
        child = forked(*arguments)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if exit_code(child) != -signal.SIGKILL:
            continue  # it had ended before the signal came; another moment
        assert exit_code(forked(*arguments)) == 0
        assert (tmp_path / "exports" / f"killed_{killed}.safetensors").read_bytes() == expected
        killed += 1
