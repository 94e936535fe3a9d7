"""A file that is replaced by another of the same name is read anew, by the server's own rules of
what it keeps."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ppcl_engine.models.bundle import PLAN_KEY
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from .graphs import Graph

DEMO = Path(__file__).resolve().parents[3] / "ppcl_engine" / "demo"
FIRST = 4000  # numbers of these tests' nodes, so that nothing is kept from other tests


@pytest.fixture
def place(server):
    """models/ppcl with a bundle and its base, and a LoRA."""
    ppcl, loras = server.base / "models" / "ppcl", server.base / "models" / "loras"
    shutil.copyfile(DEMO / "demo.ppcl.safetensors", ppcl / "mine.ppcl.safetensors")
    shutil.copyfile(DEMO / "teacher.safetensors", ppcl / "mine.safetensors")
    write_tensors(loras / "mine.safetensors", lora(1))
    yield {
        "bundle": ppcl / "mine.ppcl.safetensors",
        "base": ppcl / "mine.safetensors",
        "lora": loras / "mine.safetensors",
    }
    for path in (
        ppcl / "mine.ppcl.safetensors",
        ppcl / "mine.safetensors",
        loras / "mine.safetensors",
    ):
        path.unlink()


def lora(blocks: int) -> dict[str, torch.Tensor]:
    names = [f"transformer_blocks.{block}.attn.to_q" for block in range(blocks)]
    return {
        f"{n}.lora_{side}.weight": torch.zeros(shape)
        for n in names
        for side, shape in (("A", (2, 96)), ("B", (96, 2)))
    }


def replaced(path: Path, tensors: dict, metadata: dict) -> None:
    """As a download does it."""
    write_tensors(path.with_name("new"), tensors, metadata)
    path.with_name("new").replace(path)


@pytest.fixture
def texts(server, place):
    """What the loader, its layer map and the LoRA report say now; and which of their nodes the
    server did not run again."""
    graph = Graph(server.get("/object_info"), FIRST)
    model = graph.add(
        "PPCL_LoadModel", file="mine.ppcl.safetensors", base="mine.safetensors", variant="smallest"
    )
    nodes = {
        "loader": graph.text([model, 1]),
        "info": graph.text([graph.add("PPCL_Info", model=[model, 0]), 1]),
        "lora": graph.text(
            [graph.add("PPCL_LoraReport", model=[model, 0], lora="mine.safetensors"), 0]
        ),
    }

    def run() -> tuple[dict[str, str], set[str]]:
        entry = server.run(graph.nodes)
        if entry["status"]["status_str"] == "error":
            return {"error": server.error_of(graph.nodes)}, set()
        cached = next(
            data["nodes"]
            for kind, data in entry["status"]["messages"]
            if kind == "execution_cached"
        )
        kept = {graph.nodes[number]["class_type"] for number in cached}
        return {
            name: entry["outputs"].get(number, {}).get("text", [""])[0]
            for name, number in nodes.items()
        }, kept

    return run


def test_a_bundle_its_base_and_a_lora(texts, place):
    before, _ = texts()
    assert "\nsmall: " in before["info"] and "new_small" not in before["info"]
    again, kept = texts()
    assert {"PPCL_LoadModel", "PPCL_LoraReport", "PPCL_Info"} <= kept  # nothing has changed

    write_tensors(place["lora"], lora(3))
    after, kept = texts()
    assert (
        after["lora"] != before["lora"]
        and "PPCL_LoadModel" in kept
        and "PPCL_LoraReport" not in kept
    )

    file = TensorFile(place["bundle"])
    plan = json.loads(file.metadata[PLAN_KEY])
    plan["variants"] = [
        {**variant, "name": f"new_{variant['name']}"} for variant in plan["variants"]
    ]
    replaced(place["bundle"], file.read_all(), {**file.metadata, PLAN_KEY: json.dumps(plan)})
    after, kept = texts()
    assert (
        "new_small" in after["info"]
        and "new_small" in after["loader"]
        and "PPCL_LoadModel" not in kept
    )

    file = TensorFile(place["base"])
    replaced(
        place["base"],
        {n: t + 1 if t.ndim == 1 else t for n, t in file.read_all().items()},
        file.metadata,
    )
    assert "is not the teacher of this plan" in texts()[0]["error"]
