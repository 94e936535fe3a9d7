"""A job that makes a model sparse: whatever ends it, another attempt goes on at its block, to the
bits of the command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ppcl_engine.estimate.needs import needs
from ppcl_engine.jobs.preview import loss_curves
from ppcl_engine.jobs.spec import JobSpec, configs
from ppcl_engine.jobs.state import ask_to_cancel, read_events, read_state
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import SparsifyConfig
from ppcl_engine.stages.convert import sparsify as stage
from ppcl_engine.stages.convert.sparsify import sparsify

from ..tiny.processes import exit_code
from .conftest import fork, recording

SETTINGS = {
    "device": "cpu",
    "score": "wanda",
    "granularity": "layer",
    "exchange": False,
    "name": "half",
}
DONE, CANCELLED = 0, 130


def at_block(number: int, act) -> None:
    """In a worker: does this when so many blocks are done."""
    prune, done = stage.prune_block, []

    def pruned(*arguments):
        if len(done) == number:
            act()
        done.append(arguments)
        return prune(*arguments)

    stage.prune_block = pruned


def killed(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cancelled(path: Path) -> None:
    ask_to_cancel(path)
    while True:  # until the interrupt comes
        time.sleep(0.01)


@pytest.mark.parametrize(
    "end, code, streamed", [(killed, -signal.SIGKILL, False), (cancelled, CANCELLED, True)]
)
def test_another_attempt_goes_on_at_the_block(store, teacher_file, tmp_path, end, code, streamed):
    upstream = recording(store)
    stages = [("sparsify", {**SETTINGS, "path": teacher_file, "streamed": streamed})]
    for _, config in configs(JobSpec(stages=tuple(stages)), store.path(upstream)):
        needs(config)  # measures the machine, for all workers
    path = store.prepare("sparse", stages, upstream, preview_seconds=0).path
    assert exit_code(fork(path, before=lambda: at_block(2, lambda: end(path)))) == code
    again = store.prepare("sparse", stages, upstream, preview_seconds=0.01).path
    assert again != path and len(list((again / "sparsified" / "half").iterdir())) == 2
    assert not list((path / "states").glob("*/*"))
    assert exit_code(fork(again)) == DONE
    state = read_state(again)
    assert (state.status, state.stage) == ("done", "sparsify")
    assert sum(event["kind"] == "saved" for event in read_events(again)) == 4
    curves = loss_curves(again / "metrics.csv")
    assert set(curves["layer attn.to_q"]) >= {2, 3, 4, 5} and (again / "preview.png").exists()
    given = {
        **SETTINGS,
        "path": teacher_file,
        "calibration": Run(again).calibration,
        "run": tmp_path,
    }
    expected = sparsify(SparsifyConfig(**given))
    (file,) = [file for name, _ in store.names() for file in store.exports_of(store.path(name))]
    assert (
        file == again / "exports" / "half.safetensors"
        and file.read_bytes() == expected.read_bytes()
    )
    assert not list((again / "states").glob("*")) and not list((again / "sparsified").glob("*"))


def test_a_changed_request_takes_nothing_of_another_model(
    store, teacher_file, tmp_path, make_model, save_model
):
    """Probes and curves of one would be offered to the other, if only the stages' names counted."""
    upstream, other = (
        recording(store),
        save_model(tmp_path / "other.safetensors", make_model(seed=3)),
    )
    first = store.prepare(
        "sparse", [("sparsify", {**SETTINGS, "path": teacher_file})], upstream
    ).path
    (first / "probes").mkdir()
    (first / "probes" / "block_000.safetensors").write_bytes(b"of the first model")
    second = store.prepare("sparse", [("sparsify", {**SETTINGS, "path": other})], upstream).path
    third = store.prepare(
        "sparse", [("sparsify", {**SETTINGS, "path": teacher_file, "sparsity": 0.6})], upstream
    ).path
    assert not (second / "probes").exists() and (third / "probes").exists()
