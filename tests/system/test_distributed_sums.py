"""What processes share of one batch: losses and gradients of the parts add up to those of the
whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppcl_engine.algorithms.distillation.losses import LOSSES
from ppcl_engine.algorithms.distillation.trainer import Trainer
from ppcl_engine.settings.prune_settings import FinetuneConfig, PolishConfig
from ppcl_engine.system.distributed import Processes, processes, together
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..tiny.processes import Launched, relative


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    name=st.sampled_from([*LOSSES]),
)
def test_the_losses_of_the_parts_add_up_to_the_whole(cuts, seed, name):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(12, 5, generator=generator) for _ in range(2))
    sizes: list[torch.Tensor] = []
    expected = LOSSES[name](student, teacher, lambda size: sizes.append(size) or size)
    pieces, parts = [rows.tensor_split(sorted(cuts)) for rows in (student, teacher)], []
    for s, t in zip(*pieces, strict=True):
        whole = iter(sizes)
        parts.append(LOSSES[name](s, t, lambda size, whole=whole: next(whole)))
    assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)
    assert float(LOSSES[name](student, teacher)) == float(expected)


def trained(loss: str) -> Trainer:
    """Three updates of a small model on rows of a batch."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), 0.1)
    for _ in range(3):
        rows = processes().rows({"x": torch.randn(10, 6), "y": torch.randn(10, 4)})
        value = LOSSES[loss](trainer.module(rows["x"]), rows["y"], processes().sum)
        trainer.update(value, 1e-2, "here")
    return trainer


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_add_up_and_all_processes_keep_the_same_bits(tmp_path, count):
    def write(config: SimpleNamespace) -> None:
        for loss in LOSSES:
            write_tensors(tmp_path / f"{loss}_{processes().rank}", trained(loss).tensors())

    def work() -> int:
        together(write, SimpleNamespace(device="cpu"), "data")
        return 0

    assert Launched(tmp_path, count, work).codes() == [0] * count
    for loss in LOSSES:
        replicas = [TensorFile(tmp_path / f"{loss}_{rank}").read_all() for rank in range(count)]
        assert all(
            torch.equal(r[name], tensor) for r in replicas for name, tensor in replicas[0].items()
        )
        expected = trained(loss).tensors()
        losses = expected.pop("losses")
        torch.testing.assert_close(replicas[0]["losses"], losses, rtol=1e-6, atol=0)
        # weights, and moments, which are sums of the gradients and of their squares
        assert {name.split(".")[0] for name in expected} == {"weight", "first", "second"}
        assert all(relative(replicas[0][name], tensor) < 2e-6 for name, tensor in expected.items())


@pytest.mark.parametrize("kind", [PolishConfig, FinetuneConfig])
def test_what_learns_from_one_loss_cannot_be_split_by_intervals(kind, tmp_path):
    with pytest.raises(
        ValueError, match="--parallel intervals: this stage trains all parts on one loss"
    ):
        kind(model=tmp_path, run=tmp_path, parallel="intervals")


def test_one_process_shares_nothing():
    tensor, parameter = torch.ones(3, requires_grad=True), nn.Parameter(torch.ones(2))
    for share in ("", "data", "intervals"):
        current = Processes(share=share)
        assert (
            current.sum(tensor) is tensor
            and current.own([1, 2]) == [1, 2]
            and current.any(True) is True
        )
        assert current.folder(Path("x")) == Path("x") and current.is_main and current.writes
        rows = {"grid": torch.ones(1, 3), "timestep": torch.ones(1)}
        assert current.rows(rows) is rows
        current.sum_gradients([parameter], tensor.sum())
        current.wait()
    assert parameter.grad is None and processes() == Processes()
