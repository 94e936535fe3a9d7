"""LoRAs carried over to the variants of a tiny run."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.algorithms.distillation.trainer import Trainer
from ppcl_engine.models.lora_writing import ADAPTED
from ppcl_engine.settings.convert_settings import AdaptLoraConfig
from ppcl_engine.stages.convert.adapt_lora import adapt_lora
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.loras import RANK, write_lora
from ...tiny.trained_run import control_c

MAPS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.2")
BLOCKS = list(range(6))


@pytest.fixture(scope="module")
def lora(tmp_path_factory, teacher_file):
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return write_lora(path, teacher_file, BLOCKS, MAPS, outer=("img_in",))


@pytest.fixture(scope="module")
def adapt(complete_run, teacher_file):
    def run(lora, name: str, **settings):
        given = {"updates": 12, "warm_up": 2, "variant": "smallest", "device": "cpu", **settings}
        common = {"model": teacher_file, "run": complete_run.folder, "lora": lora, "name": name}
        return adapt_lora(AdaptLoraConfig(**common, **given))

    return run


@pytest.fixture(scope="module")
def adapted(adapt, lora):
    return adapt(lora, "whole")


def about(path) -> dict:
    return json.loads(TensorFile(path).metadata[ADAPTED])


def test_every_place_reproduces_more_of_the_change(adapted):
    """A loss of 1 a stream is nothing of it. In closed form it is less than as the file was, and less
    still when it was trained."""
    losses = about(adapted)["losses"]
    assert set(losses) == {"0", "1-2", "3-4"}
    for name, place in losses.items():
        assert place["reached"] < min(place["first"], place["summed"]), (name, place)
        assert place["reached"] <= place["closed"], (name, place)


def test_what_was_not_replaced_is_what_the_lora_says_to_the_bit(adapted, lora):
    ours, theirs = (TensorFile(path).read_all() for path in (adapted, lora))
    kept = [name for name in theirs if any(part in name for part in ("img_in", "blocks.5."))]
    assert len(kept) == 2 * (len(MAPS) + 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    inner = ("blocks.2.", "blocks.4.")  # of no place of the variant
    assert not any(part in name for name in ours for part in inner)
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in ours
    assert "transformer.transformer_blocks.0.txt_mlp.net.2.lora_A.weight" not in ours
    for module in ("txt_mlp", "projections.0.ffn_text.map"):
        pair = ours[f"diffusion_model.transformer_blocks.0.{module}.lora_A.weight"]
        assert len(pair) == RANK


def test_streamed_stopped_and_gone_on_with_gives_the_same_bits(adapted, adapt, lora, monkeypatch):
    update, done = Trainer.update, []

    def stopping(self, *arguments):
        update(self, *arguments)
        if self.step == 5 and not done:
            done.append(True)
            control_c()

    monkeypatch.setattr(Trainer, "update", stopping)
    with pytest.raises(Stopped, match="stopped at step 5 of place 0; saved"):
        adapt(lora, "again", streamed=True)
    ours, theirs = (
        TensorFile(p).read_all() for p in (adapt(lora, "again", streamed=True), adapted)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"blocks": [5]}, "changes nothing of what variant 'smallest' replaced"),
        ({"blocks": [0, 1, 2, 3]}, "it is numbered for a pruned model"),
        ({"metadata": {ADAPTED: "{}"}}, "is adapted already"),
        ({"rank": 33}, "rank 33 is above the width of"),
    ],
)
def test_bad_input_is_one_line(wrong, words, tmp_path, teacher_file, complete_run, line_of):
    path = write_lora(
        tmp_path / "lora.safetensors", teacher_file, **{"blocks": BLOCKS, "maps": MAPS, **wrong}
    )
    given = ("--model", teacher_file, "--run", complete_run.folder, "--device", "cpu")
    line = line_of("adapt-lora", *given, "--lora", path, "--variant", "smallest")
    assert words in line


def test_a_dry_run_needs_no_lora_of_that_model(tmp_path, capsys):
    given = ["--model", "qwen_image", "--run", tmp_path, "--lora", "x.safetensors", "--dry-run"]
    assert main(["adapt-lora", *map(str, given)]) == 0
    assert "adapt-lora with these settings" in capsys.readouterr().out
