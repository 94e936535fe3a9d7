"""Folding as a program posts it: the shipped workflow, a folded file written and loaded, mistakes
in one line."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from .graphs import CAPTIONS, TEACHER, Graph, quickly, shipped


def pixels(server, entry: dict, node: str) -> torch.Tensor:
    images = [server.bytes_of(image) for image in entry["outputs"][node]["images"]]
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))) for data in images]
    )


def test_the_workflow_draws_the_same_picture(server):
    """As it is, with a table, with a basis."""
    prompt = quickly(shipped("ppcl-demo-folded"))
    decoders = [
        number for number, node in prompt.items() if node["class_type"] == "PPCL_DemoDecode"
    ]
    for number in decoders:
        prompt[f"9{number}"] = {"class_type": "PreviewImage", "inputs": {"images": [number, 0]}}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success"
    plain, table, basis = (pixels(server, entry, f"9{number}") for number in decoders)
    assert torch.equal(table, plain) and plain.float().std() > 10
    assert (basis.float() - plain.float()).abs().mean() < 1


def drawing(graph: Graph, model: str) -> str:
    """Number of the node that shows what the model draws in four steps."""
    shifted = graph.add("ModelSamplingAuraFlow", model=[model, 0], shift=1.0)
    words = graph.add("PPCL_DemoCaption", captions=CAPTIONS)
    drawn = graph.add(
        "KSampler",
        model=[shifted, 0],
        positive=[words, 0],
        negative=[words, 1],
        latent_image=[words, 2],
        steps=4,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        seed=1,
    )
    return graph.add("PreviewImage", images=[graph.add("PPCL_DemoDecode", latent=[drawn, 0]), 0])


def test_a_folded_file_is_written_and_loaded(server, known):
    graph = Graph(known, first=700)
    loaded = graph.add("PPCL_LoadModel", file=TEACHER, base="none")
    shifted = graph.add("ModelSamplingAuraFlow", model=[loaded, 0], shift=1.0)
    sigmas = graph.add(
        "BasicScheduler", model=[shifted, 0], scheduler="simple", steps=4, denoise=1.0
    )
    graph.add(
        "PPCL_FoldModel",
        file=TEACHER,
        base="none",
        form="table",
        name="folded_by_post",
        precision="float32",
        samples="4",
        sigmas=[sigmas, 0],
    )
    plain = drawing(graph, loaded)
    entry = server.run(graph.nodes)
    assert entry["status"]["status_str"] == "success"
    assert (server.base / "models" / "ppcl" / "folded_by_post.safetensors").exists()
    again = Graph(known, first=800)
    folded = drawing(
        again, again.add("PPCL_LoadModel", file="folded_by_post.safetensors", base="none")
    )
    found = server.run(again.nodes)
    assert torch.equal(pixels(server, found, folded), pixels(server, entry, plain))


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"form": "table"}, "a table needs the sigmas it is made for; connect the scheduler"),
        ({"form": "basis", "name": "../../up"}, "letters, digits, '-' and '_' only"),
        ({"form": "basis", "bound": 0.001}, "no useful rank keeps the error within 0.001"),
    ],
)
def test_mistakes_are_one_line(server, known, widgets, message):
    graph = Graph(known, first=900)
    graph.add("PPCL_FoldModel", file=TEACHER, base="none", **widgets)
    found = server.error_of(graph.nodes)
    assert message in found and "\n" not in found.strip()
    assert not list((server.base / "models" / "ppcl").glob(".fold*"))


def test_a_prompt_from_before_there_was_folding(server):
    prompt = quickly(shipped("ppcl-demo-three-sizes"))
    for node in prompt.values():
        node["inputs"].pop("fold", None)
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    assert server.run(prompt)["status"]["status_str"] == "success"
