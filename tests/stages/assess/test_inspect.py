"""Inspect says what a file holds, verifies it, and lists the known models."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import parameter_count
from ppcl_engine.settings.assess_settings import InspectConfig
from ppcl_engine.stages.assess.inspect import inspect, known_models
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.released_models import KEPT, LISTS, TEACHER_BLOCKS, plant, released_state, write_folder


def test_every_known_model_as_json(capsys):
    assert main(["inspect", "--architectures", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert (
        known["qwen_image"]["blocks"] == 60
        and round(known["qwen_image"]["parameters"] / 1e9, 2) == 20.43
    )
    reads = {name: model["modulations_read"] for name, model in known.items()}
    assert reads["qwen_image"] == ["the timestep"]
    assert reads["flux1_dev"] == ["the timestep", "guidance", "pooled text"]
    assert reads["sd35_medium"] == ["the timestep", "pooled text"]


@pytest.mark.parametrize(
    "name, parameters, blocks, width",
    [
        ("sd35_large", 8_056_627_520, 38, 2432),
        ("sd35_medium", 2_243_171_520, 24, 1536),
    ],
)
def test_the_released_models_have_their_published_sizes(name, parameters, blocks, width):
    found = known_models()[name]
    sizes = {"architecture": "sd35", "parameters": parameters, "blocks": blocks, "width": width}
    assert found == {**sizes, "modulations_read": ["the timestep", "pooled text"]}


def test_an_unknown_model_lists_the_known_ones_and_its_first_keys(error_of, tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"unet.down.weight": torch.zeros(2)})
    line = error_of("inspect", "--path", tmp_path / "other.safetensors")
    assert "qwen_image" in line and "unet.down.weight" in line


def test_a_folded_file(folded, teacher_file, exported, capsys):
    inspect(InspectConfig(path=folded(teacher_file, "table"), json=True))
    assert (
        json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(("{", "")))["folded"]
        == "table of 4 timesteps"
    )
    inspect(InspectConfig(path=folded(exported("ppcl"), "basis", rank=3)))
    assert "basis of 4 coefficients" in capsys.readouterr().out


def test_a_released_folder(tmp_path, make_model, architecture, capsys):
    config = architecture.with_blocks(architecture.tiny_config, KEPT)
    state = plant(released_state(make_model(num_layers=TEACHER_BLOCKS), KEPT, LISTS))
    folder = write_folder(tmp_path, state, config, LISTS)
    assert main(["inspect", "--path", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "released width-pruned" and found["blocks"] == 6
    assert found["parameters"] == sum(t.numel() for t in state.values())
    assert found["text_projections"] == [1, 4, 5] and found["text_steps"] == [1, 5]
    assert found["ffn_projections"] == ["ffn_image:2", "ffn_text:2", "ffn_image:5"]
    assert main(["inspect", "--path", str(folder), "--legacy-txt-proj"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("share one text step" in line for line in lines) == 1
    unused = sum(
        t.numel()
        for n, t in state.items()
        if "to_add_out" in n and n.split(".")[1] in ("1", "4", "5")
    )
    with pytest.warns(UserWarning):
        assert parameter_count(open_model(folder)) == found["parameters"] - unused


def test_everything_in_a_file_is_verified(tmp_path, complete_bundle, exported, model, capsys):
    for path in (complete_bundle, exported("ppcl")):
        inspect(InspectConfig(path=path, verify=True))
        assert (
            f"{len(TensorFile(path).keys())} tensors are as they were written"
            in capsys.readouterr().out
        )
    content = bytearray(complete_bundle.read_bytes())
    content[-3] ^= 4
    (tmp_path / "a.ppcl.safetensors").write_bytes(content)
    inspect(InspectConfig(path=tmp_path / "a.ppcl.safetensors"))
    with pytest.raises(
        ValueError, match="a.ppcl.safetensors: .* does not have the hash that was stored with it"
    ):
        inspect(InspectConfig(path=tmp_path / "a.ppcl.safetensors", verify=True))
    model.save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    inspect(InspectConfig(path=tmp_path / "folder", verify=True))
    assert "carries no hashes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only with --verify"):
        inspect(InspectConfig(path=complete_bundle, base=exported("ppcl")))


def test_known_models_are_a_table(capsys):
    inspect(InspectConfig(architectures=True))
    heads, *rows = capsys.readouterr().out.splitlines()
    assert heads.split() == [
        "name",
        "architecture",
        "parameters",
        "blocks",
        "width",
        "modulations",
        "read",
        "bf16",
    ]
    (qwen,) = (row for row in rows if row.startswith("qwen_image "))
    assert "20.43 B" in qwen and qwen.endswith("40.86 GB") and "{" not in qwen


def test_a_bundle_is_facts_and_a_table_of_variants(complete_bundle, capsys):
    inspect(InspectConfig(path=complete_bundle))
    facts, variants = capsys.readouterr().out.split("\n\n")
    named = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert named["kind"] == "bundle" and named["bytes"].endswith("B")
    title, heads, *rows = variants.splitlines()
    assert title == "variants" and heads.split() == ["name", "parameters", "bytes", "damage"]
    plan = Bundle(complete_bundle).plan
    assert [row.split()[0] for row in rows] == [variant.name for variant in plan.variants]
    assert len({len(line) for line in (heads, *rows)}) == 1
