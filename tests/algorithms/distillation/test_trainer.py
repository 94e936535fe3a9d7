"""The optimizer of one module: its learning rate, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.algorithms.distillation.trainer import Diverged, Trainer, cosine_schedule


def test_an_infinite_gradient_does_not_reach_the_weights():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    trainer = Trainer(module, weight_decay=0.0)
    with pytest.raises(Diverged, match="gradient is (inf|nan) at step 0 of here"):
        trainer.update(module.weight.abs().sqrt().sum() + module.weight.sqrt().sum(), 0.1, "here")
    assert module.weight.item() == 0 and trainer.losses == []


def test_the_learning_rate_warms_up_and_falls_to_a_thirtieth():
    rates = [cosine_schedule(step, 100, 0.3, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.03) and rates[9] == pytest.approx(0.3) == max(rates)
    assert rates[55] == pytest.approx(0.3 * (1 / 30 + 29 / 60), rel=1e-6)
    assert cosine_schedule(100, 100, 0.3, 10) == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_what_was_saved_in_bfloat16_goes_on_in_float32(tmp_path):
    """Files of before: weights and moments in bfloat16."""
    torch.manual_seed(0)
    old = Trainer(torch.nn.Linear(4, 4).bfloat16(), 0.0)
    old.update(old.module(torch.ones(2, 4).bfloat16()).float().square().mean(), 0.1, "here")
    old.save(tmp_path / "old.safetensors", "{}")
    new = Trainer(torch.nn.Linear(4, 4), 0.0)
    new.restore(tmp_path / "old.safetensors")
    assert torch.equal(new.module.weight, old.module.weight.float())
    before = new.module.weight.detach().clone()
    new.update(new.module(torch.ones(2, 4)).square().mean(), 1e-5, "here")
    assert new.step == 2 and not torch.equal(new.module.weight, before)
