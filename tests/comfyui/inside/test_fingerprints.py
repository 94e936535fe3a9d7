"""What the host asks before it takes an earlier result: a file of the same name that was replaced
is another one."""

import json
import os
import shutil
import time

import folder_paths
import pytest
import torch

import nodes as host_nodes
from ppcl_engine.system.tensor_files import write_tensors

SECOND = 10**9


@pytest.fixture
def fingerprint(pack):
    return lambda node, **widgets: host_nodes.NODE_CLASS_MAPPINGS[
        f"PPCL_{node}"
    ].fingerprint_inputs(**widgets)


@pytest.fixture
def file(models, tmp_path, monkeypatch):
    """Two files and two folders, in every place that nodes read."""
    for category, name in (
        (models.ppcl, "a"),
        (models.diffusion_models, "b"),
        (models.loras, "lora"),
    ):
        write_tensors(category / f"{name}.safetensors", {"x": torch.zeros(2)})
    (models.ppcl / "folder" / "transformer").mkdir(parents=True, exist_ok=True)
    (models.ppcl / "folder" / "model_index.json").write_text("{}")
    write_tensors(models.ppcl / "folder" / "transformer" / "m.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "input" / "pictures").mkdir(parents=True)
    (tmp_path / "input" / "pictures" / "cat.txt").write_text("a cat")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    yield {
        "a.safetensors": models.ppcl / "a.safetensors",
        "b.safetensors": models.diffusion_models / "b.safetensors",
        "lora.safetensors": models.loras / "lora.safetensors",
        "folder/": models.ppcl / "folder" / "transformer" / "m.safetensors",
        "pictures": tmp_path / "input" / "pictures" / "cat.txt",
    }
    for category, name in (
        (models.ppcl, "a"),
        (models.diffusion_models, "b"),
        (models.loras, "lora"),
    ):
        (category / f"{name}.safetensors").unlink()
    shutil.rmtree(models.ppcl / "folder")


def moved_on(path) -> None:
    """The same bytes, written a second later."""
    at = path.stat().st_mtime_ns + SECOND
    os.utime(path, ns=(at, at))


READING = [
    ("LoadModel", {"file": "a.safetensors", "base": "b.safetensors"}),
    ("LoadModel", {"file": "folder/", "base": "none"}),
    ("FoldModel", {"file": "a.safetensors", "base": "b.safetensors"}),
    ("LoraReport", {"lora": "lora.safetensors"}),
    ("RecordCalibration", {"model_file": "b.safetensors"}),
    (
        "CalibrateFromPrompts",
        {"model_file": "folder/", "references": "pictures", "wait": True, "start": True},
    ),
    ("Sparsify", {"file": "a.safetensors", "wait": True, "start": True}),
]


@pytest.mark.parametrize("node, widgets", READING)
def test_each_file_that_a_node_reads(fingerprint, file, node, widgets):
    seen = [fingerprint(node, **widgets)]
    assert seen == [fingerprint(node, **widgets)]
    for name in [name for name in widgets.values() if name in file]:
        moved_on(file[name])
        seen.append(fingerprint(node, **widgets))
        with open(file[name], "ab") as more:
            more.write(b" ")
        seen.append(fingerprint(node, **widgets))
    assert len(set(seen)) == len(seen) > 2


def test_a_run_that_is_named(fingerprint, file, tmp_path, monkeypatch):
    """Programs name it where the page sends a link: the model that it is about is read."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder = tmp_path / "output" / "ppcl" / "record-00000000"
    folder.mkdir(parents=True)
    (folder / "recording.json").write_text(json.dumps({"model": str(file["b.safetensors"])}))
    for node in (
        "Probe",
        "Detect",
        "DistillDepth",
        "DistillWidth",
        "FineTune",
        "Export",
        "Sparsify",
    ):
        before = fingerprint(node, run=folder.name)
        moved_on(file["b.safetensors"])
        assert fingerprint(node, run=folder.name) not in (
            before,
            fingerprint(node, run="record-00000001"),
        ), node
    before = fingerprint("EditPlan", run=folder.name)
    (folder / "plan.json").write_text("{}")
    assert fingerprint("EditPlan", run=folder.name) != before


def test_a_link_that_leads_elsewhere(fingerprint, file, models, tmp_path):
    """As a hub cache has them: the name stays, the file behind it is another one."""
    link = models.ppcl / "link.safetensors"
    for name in ("one", "two"):
        shutil.copyfile(file["a.safetensors"], tmp_path / name)
        os.utime(tmp_path / name, ns=(SECOND, SECOND))
    link.symlink_to(tmp_path / "one")
    before = fingerprint("LoadModel", file=link.name, base="none")
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert fingerprint("LoadModel", file=link.name, base="none") != before
    link.unlink()


@pytest.mark.parametrize("value", ["gone.safetensors", "../x", "", "\0", None, 5, [], {"a": 1}])
def test_what_is_not_there_has_a_fingerprint_too(fingerprint, caplog, value):
    """The node itself says what is wrong when it is executed."""
    for node, names in (
        ("LoadModel", ("file", "base")),
        ("LoraReport", ("lora",)),
        ("Probe", ("run",)),
        ("EditPlan", ("run",)),
    ):
        given = dict.fromkeys(names, value)
        assert fingerprint(node, **given) == fingerprint(node, **given)
    assert not caplog.records


def test_nodes_that_read_no_file_stay(fingerprint):
    for node in ("Variant", "Info", "Compare", "DemoCaption", "DemoDecode"):
        assert fingerprint(node, variant="small") == fingerprint(node, variant="small")


def test_a_run_that_is_not_waited_for_is_looked_at_again(fingerprint, file):
    for widgets in ({"wait": False}, {"start": False}):
        before = fingerprint("Probe", **widgets)
        time.sleep(0.01)
        assert fingerprint("Probe", **widgets) != before
