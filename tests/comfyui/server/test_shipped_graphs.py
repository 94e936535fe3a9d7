"""The shipped templates of large models run, with small models in place of theirs."""

import json

import pytest

from ppcl_engine.architectures import architecture_named
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.tensor_files import write_tensors

from ...tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ...tiny.models import tiny_model
from ...tiny.sd35_parts import SD35_PARTS, SD35_SIZES
from ...tiny.trained_run import write_parts
from .conftest import ROOT
from .graphs import CAPTIONS, TEACHER, quickly, shipped

FLUX, SD35 = architecture_named("flux1"), architecture_named("sd35")
SMALL = {
    "ppcl-flux-dev": (
        FLUX,
        {**FLUX_DEPTH, "in_channels": 64},
        FLUX_PARTS,
        "flux1-dev.safetensors",
        "flux1-dev.ppcl.safetensors",
    ),
    "ppcl-sd35-large": (
        SD35,
        SD35_SIZES,
        SD35_PARTS,
        "sd3.5_large.safetensors",
        "sd35-large.ppcl.safetensors",
    ),
}
ENCODERS = ("DualCLIPLoader", "TripleCLIPLoader", "VAELoader")


@pytest.fixture(scope="module")
def small_files(server):
    """Makes files of a random model that reads the demo's captions, in place of a workflow's: name
    there -> name here."""

    def make(workflow: str) -> dict[str, str]:
        architecture, changes, parts, base, bundle = SMALL[workflow]
        config = {
            **architecture.tiny_config,
            **changes,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
        }
        name = f"small_{architecture.name}"
        teacher = server.base / "models" / "diffusion_models" / f"{name}.safetensors"
        write_tensors(
            teacher, tiny_model(architecture, **config).state_dict(), {"config": json.dumps(config)}
        )
        run = Run(server.base / f"{name}_parts")
        run.folder.mkdir()
        write_parts(run, teacher, parts=parts)
        made = export(
            ExportConfig(
                model=teacher, run=run.folder, layout="bundle", name=name, store="bfloat16"
            )
        )
        made.replace(server.base / "models" / "ppcl" / made.name)
        return {base: teacher.name, bundle: made.name}

    return make


@pytest.mark.parametrize("workflow", SMALL)
def test_a_large_model_s_graph_runs_with_a_small_one(server, small_files, workflow):
    """As shipped: loaded switchable, a variant chosen, guided. Exchanged: files, captions,
    pictures."""
    prompt, names = shipped(workflow), small_files(workflow)
    graph = {number: node for number, node in prompt.items() if node["class_type"] not in ENCODERS}
    for number, node in list(graph.items()):
        inputs = node["inputs"]
        inputs |= {name: names[value] for name, value in inputs.items() if str(value) in names}
        match node["class_type"]:
            case "CLIPTextEncode":
                graph[number] = {
                    "class_type": "PPCL_DemoCaption",
                    "inputs": {"captions": CAPTIONS.splitlines()[0]},
                }
            case "EmptySD3LatentImage":
                inputs |= {"width": 96, "height": 96}
            case "VAEDecode":
                graph[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save, info = (
        [n for n, node in graph.items() if node["class_type"] == kind][0]
        for kind in ("SaveImage", "PPCL_Info")
    )
    assert len(entry["outputs"][save]["images"]) == 1 and len(entry["outputs"][info]["images"]) == 1


def test_the_edit_graph_runs_with_the_bundled_teacher(server):
    """As shipped: loaded switchable, a variant chosen, a reference in every forward. Exchanged:
    files, instructions for captions, pictures for latents, since the teacher has tables in place of
    a text encoder and a VAE."""
    prompt = shipped("ppcl-qwen-image-edit")
    gone = {"CLIPLoader", "VAELoader", "LoadImage", "FluxKontextImageScale", "VAEEncode"}
    graph = {number: node for number, node in prompt.items() if node["class_type"] not in gone}
    instructions = [
        n for n, node in graph.items() if node["class_type"] == "TextEncodeQwenImageEditPlus"
    ]
    for output, number in enumerate(instructions):
        given = {"conditioning": ["words", output], "latent": ["picture", 0]}
        graph[number] = {"class_type": "ReferenceLatent", "inputs": given}
    size = {"width": 64, "height": 64, "length": 1, "batch_size": 1}
    graph |= {
        "words": {
            "class_type": "PPCL_DemoCaption",
            "inputs": {"captions": CAPTIONS.splitlines()[0]},
        },
        "picture": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
    }
    for number, node in list(graph.items()):
        inputs = node["inputs"]
        match node["class_type"]:
            case "PPCL_LoadModel":
                inputs |= {"file": "demo/demo.ppcl.safetensors", "base": TEACHER}
            case "KSampler":
                inputs |= {"latent_image": ["words", 2], "steps": 4}
            case "VAEDecode":
                graph[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save = next(number for number, node in graph.items() if node["class_type"] == "SaveImage")
    assert len(instructions) == 2 and len(entry["outputs"][save]["images"]) == 1


def with_the_bundled_teacher(prompt: dict) -> dict:
    """The same graph for the small teacher. Exchanged, node for node: the model's file name in its
    combos; prompt nodes (CLIP Text Encode) and the empty latent for Demo Caption, VAE Decode for
    Demo Decode. Left out: the loaders of text encoder and VAE, which the teacher's file holds. The
    picture's size becomes the model's own."""
    words = next(
        number for number, node in prompt.items() if node["class_type"] == "CLIPTextEncode"
    )
    gone = {"CLIPLoader", "VAELoader", "EmptySD3LatentImage"}
    graph = {number: node for number, node in prompt.items() if node["class_type"] not in gone}
    for number, node in list(graph.items()):
        inputs = node["inputs"]
        inputs |= {
            name: TEACHER
            for name, value in inputs.items()
            if value == "qwen_image_bf16.safetensors"
        }
        match node["class_type"]:
            case "PPCL_CalibrateFromPrompts":
                del inputs["clip"]
                inputs |= {"height": 0, "width": 0}
            case "CLIPTextEncode":
                graph[number] = {"class_type": "PPCL_DemoCaption", "inputs": {"captions": CAPTIONS}}
            case "KSampler":
                inputs |= {
                    "positive": [words, 0],
                    "negative": [words, 1],
                    "latent_image": [words, 2],
                }
            case "VAEDecode":
                graph[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    return graph


@pytest.mark.any_host
def test_the_large_model_s_graph_runs_with_the_bundled_teacher(server):
    """Streamed and in bfloat16, as it is shipped."""
    prompt = quickly(with_the_bundled_teacher(shipped("ppcl-qwen-image-distil")))
    assert len(prompt) == len(shipped("ppcl-qwen-image-distil")) - 3
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save = next(number for number, node in prompt.items() if node["class_type"] == "SaveImage")
    assert len(entry["outputs"][save]["images"]) == len(CAPTIONS.splitlines())


MAKING = {"CalibrateFromPrompts", "Probe", "Detect", "DistillDepth", "Export"}


def test_the_int8_graph_draws_beside_the_full_model(server):
    """As shipped: both loaded, drawn and compared. Exchanged: the jobs that make the file, for the file of a
    small run; they have a graph of their own, which is run."""
    pytest.importorskip("comfy_kitchen", reason="this ComfyUI knows no int8")
    teacher, run = ROOT / "ppcl_engine" / TEACHER, Run(server.base / "int8_parts")
    run.folder.mkdir()
    write_parts(run, teacher, width=False)
    prompt = shipped("ppcl-demo-pruned-int8")
    (export_node,) = [n for n in prompt.values() if n["class_type"] == "PPCL_Export"]
    settings = {
        name: export_node["inputs"][name] for name in ("layout", "name", "variant", "store")
    }
    made = export(ExportConfig(model=teacher, run=run.folder, **settings))
    made.replace(server.base / "models" / "ppcl" / made.name)
    making = {f"PPCL_{name}" for name in MAKING}
    graph = {number: node for number, node in prompt.items() if node["class_type"] not in making}
    for node in graph.values():
        match node["class_type"]:
            case "PPCL_LoadModel" if isinstance(node["inputs"]["file"], list):
                node["inputs"]["file"] = made.name
            case "PPCL_DemoCaption":
                node["inputs"]["captions"] = CAPTIONS.splitlines()[0]
            case "KSampler":
                node["inputs"]["steps"] = 2
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    (compare,) = [n for n, node in graph.items() if node["class_type"] == "PPCL_Compare"]
    assert len(graph) == 10 and len(entry["outputs"][compare]["images"]) == 1
