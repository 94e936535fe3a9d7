"""Lists of files: what a user has is in them by a name that stays, and nothing that lies in a
folder takes a node from the host."""

import json
import logging
import os
import struct
import sys
from pathlib import Path

import folder_paths
import pytest
import torch

import nodes as host_nodes
from ppcl_engine.models.bundle import PLAN_KEY
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

MANY = 500
OURS = [
    "PPCL_LoadModel",
    "PPCL_Variant",
    "PPCL_FoldModel",
    "PPCL_Sparsify",
    "PPCL_CalibrateFromPrompts",
    "PPCL_RecordCalibration",
    "PPCL_LoraReport",
    "PPCL_AdaptLora",
    "PPCL_WatchJob",
    "PPCL_CancelJob",
]
"""Nodes with lists in them"""


def of_header(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def with_metadata(value) -> bytes:
    return of_header(json.dumps({"__metadata__": value}))


def deep(levels: int = 20_000) -> str:
    return "[" * levels + "]" * levels


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\x07\0\0\0\0\0\0",
    "no safetensors": b"this is no model at all",
    "an absurd length": struct.pack("<Q", 2**63) + b"{}",
    "a length that the file has not": struct.pack("<Q", 10**9) + b"{}",
    "no text": of_header(b'\xff\xfe{"ppcl_plan'),
    "no JSON": of_header('{"ppcl_plan": '),
    "a list": of_header('["ppcl_plan"]'),
    "a text": of_header('"ppcl_plan"'),
    "metadata that is a number": of_header('{"__metadata__": 5, "ppcl_plan": 1}'),
    "metadata that is a list": with_metadata([PLAN_KEY]),
    "a plan that is a number": with_metadata({PLAN_KEY: 5}),
    "a plan that is an object": with_metadata({PLAN_KEY: {"variants": 1}}),
    "a plan that is nothing": with_metadata({PLAN_KEY: None}),
    "a plan that is no JSON": with_metadata({PLAN_KEY: "{"}),
    "a plan of a number": with_metadata({PLAN_KEY: "17"}),
    "variants that are a number": with_metadata({PLAN_KEY: '{"variants": 7}'}),
    "a variant that is a number": with_metadata({PLAN_KEY: '{"variants": [7]}'}),
    "a variant without a name": with_metadata({PLAN_KEY: '{"variants": [{}]}'}),
    "a variant whose name is a list": with_metadata({PLAN_KEY: '{"variants": [{"name": []}]}'}),
    "a variant with an endless name": with_metadata(
        {PLAN_KEY: json.dumps({"variants": [{"name": "x" * 10_000}]})}
    ),
    "a nesting without end": of_header(f'{{"ppcl_plan": {deep()}}}'),
    "a plan nested without end": with_metadata({PLAN_KEY: deep()}),
    "a number without end": of_header('{"ppcl_plan": ' + "9" * 10_000 + "}"),
}
SHORT = {"empty", "seven bytes"}


@pytest.fixture
def base(models, tmp_path, monkeypatch) -> Path:
    """Folders of its own for the host: models/ppcl, models/diffusion_models, models/loras, output
    and input."""
    for name, endings in (
        ("ppcl", set()),
        ("diffusion_models", {".safetensors"}),
        ("loras", {".safetensors"}),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], endings)
        )
    for name in ("output", "input"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path


@pytest.fixture
def choices(pack):
    """What a combo of a node offers, as the host's page gets it."""

    def of(node: str, name: str) -> list[str]:
        info = host_nodes.NODE_CLASS_MAPPINGS[node].GET_NODE_INFO_V1()["input"]
        kind, *more = {**info["required"], **info.get("optional", {})}[name]
        return kind if isinstance(kind, list) else more[0]["options"]

    return of


@pytest.fixture
def opened(monkeypatch):
    """Paths of files that Python opens, while it is asked to note them."""
    found, noting = [], []

    def hear(event: str, arguments: tuple) -> None:
        if noting and event == "open":
            found.append(str(arguments[0]))

    sys.addaudithook(hear)

    class Noted:
        def __enter__(self):
            found.clear()
            noting.append(True)
            return found

        def __exit__(self, *_):
            noting.clear()

    return Noted()


def folder(path: Path, config: dict | str, file: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    write_tensors(path / file, {"a": torch.zeros(1)})
    return path


TRANSFORMER = {"_class_name": "QwenImageTransformer2DModel"}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_takes_no_node_from_the_host(base, bundle, choices, caplog, kind):
    (base / "ppcl" / "good.ppcl.safetensors").symlink_to(bundle)
    for place in ("ppcl", "diffusion_models"):
        (base / place / f"{place}.ppcl.safetensors").write_bytes(DAMAGED[kind])
    with caplog.at_level(logging.WARNING):
        for node in OURS:
            assert host_nodes.NODE_CLASS_MAPPINGS[node].GET_NODE_INFO_V1()["name"] == node
        assert "small" in choices("PPCL_Variant", "variant") and "small" in choices(
            "PPCL_LoadModel", "variant"
        )
        names = choices("PPCL_LoadModel", "file")
    assert {
        "good.ppcl.safetensors",
        "ppcl.ppcl.safetensors",
        "diffusion_models.ppcl.safetensors",
    } <= set(names)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted("/ppcl.ppcl." in line for line in said) == [False, True], said  # each file once
    assert all(
        "shows none of its variants: " in line and "\n" not in line and len(line) < 600
        for line in said
    )


def test_the_log_says_it_again_when_the_file_has_changed(base, choices, caplog):
    file = base / "ppcl" / "a.safetensors"
    for text in ("no model", "no model either"):
        file.write_text(text)
        choices("PPCL_Variant", "variant"), choices("PPCL_LoadModel", "variant")
    assert len([record for record in caplog.records if "a.safetensors" in record.getMessage()]) == 2


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_that_is_chosen_is_one_line(base, load, kind):
    (base / "ppcl" / "damaged.ppcl.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError) as error:
        load("damaged.ppcl.safetensors")
    assert "damaged.ppcl.safetensors" in str(error.value) and "\n" not in str(error.value)


def odd_entries(folder: Path) -> None:
    """What no program writes on purpose, by names that a list would show."""
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "broken.safetensors").symlink_to(folder / "nowhere")
    (folder / "itself.safetensors").symlink_to(folder / "itself.safetensors")
    # fails as a folder that may not be read does
    (folder / "too_long.safetensors").symlink_to("x" * 300)
    (folder / "folder.safetensors").mkdir()
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "gone").symlink_to(folder / "nowhere", target_is_directory=True)
    (folder / "far").symlink_to("y" * 300)
    (folder / "a\nb").mkdir()


def test_odd_entries(base, choices, caplog):
    for name in ("ppcl", "diffusion_models", "loras", "input", "output/ppcl"):
        (base / name).mkdir(exist_ok=True)
        odd_entries(base / name)
    write_tensors(base / "ppcl" / "good.safetensors", {"a": torch.zeros(1)})
    write_tensors(base / "loras" / "good.safetensors", {"a": torch.zeros(1)})
    demo = {"demo/demo.ppcl.safetensors", "demo/teacher.safetensors"}
    assert set(choices("PPCL_LoadModel", "file")) == {"good.safetensors", *demo}
    assert choices("PPCL_LoraReport", "lora") == ["good.safetensors"]
    assert choices("PPCL_CalibrateFromPrompts", "references") == [
        "none",
        "a\nb",
        "folder.safetensors",
        "round",
    ]
    assert choices("PPCL_WatchJob", "run_name") == ["newest"]
    assert any(
        "too_long.safetensors is left out of the lists" in record.getMessage()
        for record in caplog.records
    )


def test_links_in_circles(base, choices):
    """Each of ten folders leads to all others."""
    folders = [base / "ppcl" / f"folder{number}" for number in range(10)]
    for place in folders:
        place.mkdir()
        write_tensors(place / "model.safetensors", {"a": torch.zeros(1)})
        for other in range(10):
            (place / f"to{other}").symlink_to(folders[other], target_is_directory=True)
    names = choices("PPCL_LoadModel", "file")
    assert {f"folder{number}/model.safetensors" for number in range(10)} <= set(names)


@pytest.fixture
def releases(base) -> Path:
    """models/ppcl with releases as they are downloaded: a repository with several models, a hub cache,
    a transformer alone, a pipeline, and links to folders elsewhere."""
    ppcl, other = base / "ppcl", base / "elsewhere"
    folder(ppcl / "plain", {"any": "thing"})  # directly in models/ppcl whatever has a configuration
    for name in ("Qwen-Image-12B", "Qwen-Image-13B"):
        folder(ppcl / "repo" / name, TRANSFORMER)
    folder(
        ppcl / "repo" / "text_encoder", {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    )
    folder(ppcl / "partial" / "transformer", TRANSFORMER)
    folder(ppcl / "pipeline" / "transformer", TRANSFORMER)
    folder(ppcl / "pipeline" / "vae", {"_class_name": "AutoencoderKLQwenImage"})
    (ppcl / "pipeline" / "model_index.json").write_text("{}")
    hub = ppcl / "models--ORG--NAME"
    snapshot = hub / "snapshots" / ("0" * 40)
    blobs = folder(hub / "blobs" / "made", TRANSFORMER)
    for name in ("Qwen-Image-10B", "transformer"):
        (snapshot / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (snapshot / name / file).symlink_to(blobs / file)
    folder(other / "linked", TRANSFORMER)
    (ppcl / "linked").symlink_to(other / "linked", target_is_directory=True)
    (base / "diffusion_models" / "disk").symlink_to(other, target_is_directory=True)
    write_tensors(other / "single.safetensors", {"a": torch.zeros(1)})
    return ppcl


def test_releases_are_listed_as_they_are_downloaded(releases, choices):
    listed = {name for name in choices("PPCL_LoadModel", "file") if not name.startswith("demo/")}
    expected = {
        "plain/",
        "repo/Qwen-Image-12B/",
        "repo/Qwen-Image-13B/",
        "partial/transformer/",
        "pipeline/",
        "linked/",
        f"models--ORG--NAME/snapshots/{'0' * 40}/Qwen-Image-10B/",
        f"models--ORG--NAME/snapshots/{'0' * 40}/transformer/",
        "disk/linked/",
        "disk/single.safetensors",
    }
    assert listed - {"models--ORG--NAME/blobs/made/"} == expected
    assert listed <= set(choices("PPCL_RecordCalibration", "model_file"))


def test_a_release_is_found_by_its_name(releases, pack):
    path = pack("paths").model_path("repo/Qwen-Image-12B/")
    assert path == releases / "repo" / "Qwen-Image-12B"


@pytest.mark.parametrize(
    "config", ["[]", "{", "7", deep(), "", '{"_class_name": 5}', "x" * 2_000_000]
)
def test_a_configuration_of_anything(base, choices, config):
    folder(base / "ppcl" / "repo" / "odd", config)
    folder(base / "ppcl" / "repo" / "good", TRANSFORMER)
    folder(base / "ppcl" / "odd", config)
    assert [n for n in choices("PPCL_LoadModel", "file") if not n.startswith("demo/")] == [
        "odd/",
        "repo/good/",
    ]


def test_a_configuration_beside_the_files_hides_none(base, choices):
    (base / "ppcl" / "config.json").write_text("{}")
    write_tensors(base / "ppcl" / "a.safetensors", {"a": torch.zeros(1)})
    assert "a.safetensors" in choices("PPCL_LoadModel", "file")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "repo/../repo/m/", "repo", "repo/m", "", "repo//m/"]
)
def test_a_name_is_looked_up(base, pack, name):
    """Never joined to a folder."""
    folder(base / "ppcl" / "repo" / "m", TRANSFORMER)
    folder(base / "secret", TRANSFORMER)
    assert pack("paths").model_path("repo/m/")
    with pytest.raises(
        ValueError, match="is neither in models/ppcl nor in models/diffusion_models"
    ):
        pack("paths").model_path(name)


def test_many_files_are_looked_into_once(base, bundle, choices, opened):
    small = {"a": torch.zeros(1)}
    for number in range(MANY):
        (
            base / ("ppcl" if number % 2 else "diffusion_models") / f"{number}.safetensors"
        ).write_bytes(of_header("{}"))
    bundles = [base / "ppcl" / f"b{number}.ppcl.safetensors" for number in range(3)]
    for path in bundles:
        write_tensors(path, small, TensorFile(bundle).metadata)
    with opened as files:
        first = [host_nodes.NODE_CLASS_MAPPINGS[node].GET_NODE_INFO_V1()["input"] for node in OURS]
    looked = [path for path in files if path.startswith(str(base))]
    assert len(looked) == len(set(looked)) == MANY + 3
    with opened as files:
        assert [
            host_nodes.NODE_CLASS_MAPPINGS[node].GET_NODE_INFO_V1()["input"] for node in OURS
        ] == first
    assert not [path for path in files if path.startswith(str(base))]
    write_tensors(bundles[0], {**small, "b": torch.zeros(2)}, TensorFile(bundle).metadata)
    (base / "ppcl" / "1.safetensors").unlink()
    with opened as files:
        assert "1.safetensors" not in choices("PPCL_LoadModel", "file")
    assert [path for path in files if path.startswith(str(base))] == [str(bundles[0])]
