"""The demo's workflow as a program posts it: pictures come out; what is wrong is one line, and the
server goes on."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_engine.data.rendered.captions import parse_caption
from ppcl_engine.data.rendered.reader import load_reader, read, score

from .conftest import NOT_IN_LIST


def nodes_of(prompt: dict, kind: str) -> list[str]:
    return [number for number, node in prompt.items() if node["class_type"] == kind]


def quick(prompt: dict, captions: str = "a red K on a blue circle, yellow background") -> dict:
    """One variant, two steps, one picture."""
    keep = {*nodes_of(prompt, "PPCL_LoadModel"), *nodes_of(prompt, "ModelSamplingAuraFlow")}
    keep |= {
        nodes_of(prompt, kind)[0]
        for kind in ("PPCL_DemoCaption", "PPCL_Variant", "KSampler", "PPCL_DemoDecode")
    }
    small = {
        number: {**node, "inputs": dict(node["inputs"])}
        for number, node in prompt.items()
        if number in keep
    }
    small[nodes_of(small, "KSampler")[0]]["inputs"]["steps"] = 2
    small[nodes_of(small, "PPCL_DemoCaption")[0]]["inputs"]["captions"] = captions
    picture = [nodes_of(small, "PPCL_DemoDecode")[0], 0]
    return {**small, "99": {"class_type": "PreviewImage", "inputs": {"images": picture}}}


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255
    )


def test_the_demo_draws(server, demo):
    """The teacher's own pictures, in the first of the columns, are read right."""
    decode = nodes_of(demo, "PPCL_DemoDecode")[0]
    demo[decode]["inputs"]["enlarge"] = 1
    # unused there, but other than in an earlier test: nothing is cached
    for variant in nodes_of(demo, "PPCL_Variant"):
        demo[variant]["inputs"]["size"] = 0.5
    demo["99"] = {"class_type": "PreviewImage", "inputs": {"images": [decode, 0]}}
    entry = server.run(demo)
    assert entry["status"]["status_str"] == "success"
    pictures = torch.stack([pixels(server.bytes_of(i)) for i in entry["outputs"]["99"]["images"]])
    captions = [
        parse_caption(line)
        for line in demo[nodes_of(demo, "PPCL_DemoCaption")[0]]["inputs"]["captions"].split("\n")
    ]
    assert all(
        right.all()
        for right in score(read(load_reader(), pictures.movedim(-1, 1)), captions).values()
    )
    for kind in ("PPCL_Compare", "PPCL_Info"):
        (image,) = entry["outputs"][nodes_of(demo, kind)[0]]["images"]
        assert pixels(server.bytes_of(image)).std() > 0.1


@pytest.mark.parametrize(
    "kind, widgets, message",
    [
        (
            "PPCL_DemoCaption",
            {"captions": "a red lion"},
            "this model does not know the word 'lion'",
        ),
        (
            "PPCL_LoadModel",
            {"file": "gone.ppcl.safetensors"},
            "'gone.ppcl.safetensors' is neither in models/ppcl",
        ),
        (
            "PPCL_LoadModel",
            {"base": "none"},
            "is a bundle: students only; choose as base the model it was made from",
        ),
        ("PPCL_LoadModel", {"variant": "tiny"}, "variant 'tiny' is not in the plan; it has: "),
        ("PPCL_Variant", {"on": "3-99"}, "interval '3-99' is not in the plan"),
    ],
)
def test_bad_input_is_one_line(server, demo, kind, widgets, message):
    prompt = quick(demo)
    prompt[nodes_of(prompt, kind)[0]]["inputs"] |= widgets
    found = server.error_of(prompt)
    assert (message in found or found.startswith(NOT_IN_LIST)) and "\n" not in found.strip()
    assert server.run(quick(demo))["status"]["status_str"] == "success"


def test_a_latent_of_another_size(server, demo):
    prompt = quick(demo)
    prompt["98"] = {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1},
    }
    prompt[nodes_of(prompt, "PPCL_DemoDecode")[0]]["inputs"]["latent"] = ["98", 0]
    assert "this one is 4 x 1 x 8 x 8; use the latent of Demo Caption (PPCL)" in server.error_of(
        prompt
    )
    assert server.run(quick(demo))["status"]["status_str"] == "success"
