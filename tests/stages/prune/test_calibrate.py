"""Calibration: the same bits streamed and resident, and after a stop; the whole schedule; empty
captions."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.data import flow
from ppcl_engine.data.calibration import CLEAN, load_calibration
from ppcl_engine.data.flow import noised
from ppcl_engine.data.noised_batches import spread_timesteps
from ppcl_engine.demo.bundled import TEACHER, render_pictures
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.prune_settings import CalibrateConfig
from ppcl_engine.stages.prune import calibrate as stage
from ppcl_engine.stages.prune.calibrate import calibrate
from ppcl_engine.system.progress import Progress

CAPTIONS = (
    "a red K on a blue circle, yellow background\na white 7 on a black square, green background\n"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "captions.txt"
    path.write_text(CAPTIONS)
    return path


def config(run, **changes) -> CalibrateConfig:
    return CalibrateConfig(
        model=TEACHER, run=run, device="cpu", samples=6, batch=2, steps=3, **changes
    )


def bits(path) -> dict[str, bytes]:
    return {
        f"{n}.{k}": t.numpy().tobytes()
        for n, batch in enumerate(load_calibration(path).batches)
        for k, t in batch.items()
    }


def test_drawing_streamed_is_drawing_resident(tmp_path, prompts):
    resident = calibrate(config(tmp_path / "a", prompts=prompts))
    streamed = calibrate(config(tmp_path / "b", prompts=prompts, streamed=True))
    assert bits(resident) == bits(streamed)


def test_a_step_reads_the_model_once_for_all_pictures(tmp_path, prompts, monkeypatch):
    """Three batches, with a caption and without; with less memory, once for as many as fit."""
    read, load = [], Teacher._load
    monkeypatch.setattr(
        Teacher, "_load", lambda self, index: read.append(index) or load(self, index)
    )
    moved = []
    monkeypatch.setattr(Progress, "update", lambda self, n=1: moved.append(n))
    expected = bits(calibrate(config(tmp_path / "a", prompts=prompts)))
    blocks = Weights(TEACHER).num_blocks
    assert len(read) == blocks  # a look at whether it is finite
    for cache_gb, groups in ((8.0, 1), (1.5e-4, 2), (1e-6, 3)):
        read.clear(), moved.clear()
        path = calibrate(
            config(tmp_path / str(cache_gb), prompts=prompts, streamed=True, cache_gb=cache_gb)
        )
        assert bits(path) == expected
        assert len(read) == groups * 3 * blocks
        # block by block
        assert sum(moved) == groups * 3 * blocks and moved.count(1) == groups * 3 * blocks


def test_drawing_together_goes_on_where_it_was_stopped(tmp_path, prompts, monkeypatch):
    """Killed in the second step of the second group: what is done is not drawn again."""
    whole = bits(calibrate(config(tmp_path / "whole", prompts=prompts)))
    step, done = flow.euler_step, []

    def stops(*arguments):
        done.append(1)
        if len(done) == 8:  # 2 batches of 3 steps together, then one step of the third alone
            raise SystemError("killed")
        return step(*arguments)

    settings = config(tmp_path / "run", prompts=prompts, streamed=True, cache_gb=1.5e-4)
    monkeypatch.setattr(flow, "euler_step", stops)
    with pytest.raises(SystemError):
        calibrate(settings)
    assert bits(calibrate(settings)) == whole
    assert len(done) == 8 + 2
    assert not (tmp_path / "run" / "states" / "calibrate").exists()


@pytest.mark.parametrize("source", ["prompts", "images"])
def test_a_stopped_calibration_goes_on_to_the_same_bits(tmp_path, prompts, source, monkeypatch):
    given = (
        {"prompts": prompts}
        if source == "prompts"
        else {"images": render_pictures(tmp_path / "images", 4, 0)}
    )
    expected = bits(calibrate(config(tmp_path / "whole", **given)))
    name = "_drawn" if source == "prompts" else "noised_batch"
    make, made = getattr(stage, name), []

    def stops_at_the_second(*arguments):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(stage, name, stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config(tmp_path / "run", **given))
    assert bits(calibrate(config(tmp_path / "run", **given))) == expected
    assert len(made) == 4  # one before the stop, one that stopped, two after


def test_pictures_are_noised_at_the_recorded_timestep_with_empty_captions_among_them(tmp_path):
    images = render_pictures(tmp_path / "images", 4, 0)
    batches = load_calibration(
        calibrate(config(tmp_path, images=images, empty_captions=0.5))
    ).batches
    lengths = torch.cat([batch["encoder_hidden_states_mask"].sum(1) for batch in batches])
    assert set(lengths.tolist()) == {1, 9}
    for batch in batches:
        t = batch["timestep"][:, None, None]
        noise = (batch["hidden_states"] - (1 - t) * batch[CLEAN]) / t
        assert torch.allclose(
            noised(batch[CLEAN], noise, batch["timestep"]), batch["hidden_states"], atol=1e-5
        )
        assert 0.5 < float(noise.std()) < 1.5


def test_states_of_drawing_are_states_on_the_way(tmp_path, prompts):
    batches = load_calibration(calibrate(config(tmp_path, prompts=prompts))).batches
    times = torch.cat([batch["timestep"] for batch in batches])
    assert set(times.tolist()) <= {1.0, float(torch.tensor(2 / 3)), float(torch.tensor(1 / 3))}
    assert all(float(batch[CLEAN].std()) > 0.3 for batch in batches)


def test_timesteps_cover_the_whole_schedule():
    timesteps = spread_timesteps(100, torch.Generator().manual_seed(0)).sort().values
    assert torch.equal((timesteps * 100).long(), torch.arange(100))


def test_one_source_is_needed(tmp_path, prompts):
    with pytest.raises(ValueError, match="needs one source"):
        calibrate(config(tmp_path))
    with pytest.raises(ValueError, match="needs one source"):
        calibrate(config(tmp_path, prompts=prompts, images=tmp_path))
