"""Everything that is shipped for the page: templates fit the server's nodes, each node has its help
and tooltips."""

import json
import re
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from ppcl_engine.architectures import architecture_named
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, ImportConfig
from ppcl_engine.settings.help_texts import setting_help
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.tensor_files import write_tensors

from ...tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ...tiny.models import tiny_model
from ...tiny.sd35_parts import SD35_PARTS, SD35_SIZES
from ...tiny.trained_run import write_parts
from .conftest import ROOT
from .graphs import CAPTIONS, TEACHER, quickly, shipped

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"), key=lambda path: path.stem)
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
SCALARS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
PAGE_ONLY = {"MarkdownNote"}
CONTROL = "control_after_generate"
CHOSEN_BY_THE_PAGE = (
    "COMBO",
    {"options": ["fixed", "increment", "decrement", "randomize", "image"]},
)
FILES = (".safetensors", ".png")
MUTED = 2
SETTINGS = {
    ("PPCL_LoadModel", "intervals"): "intervals",
    ("PPCL_LoadModel", "legacy_text"): "legacy_txt_proj",
}


@pytest.fixture(scope="module")
def ours(known) -> dict:
    return {name: node for name, node in known.items() if name.startswith("PPCL_")}


def inputs_of(node: dict) -> dict[str, tuple[str, dict]]:
    """name -> (type, options). A list of choices, in either of the two forms that hosts give it, is
    in `options`."""
    rows = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    found = {}
    for name, (kind, *more) in rows.items():
        options = more[0] if more else {}
        found[name] = (
            (kind, options) if isinstance(kind, str) else ("COMBO", {**options, "options": kind})
        )
    return found


def widgets_of(node: dict) -> list[str]:
    """Names of the values that a saved workflow holds, in their order."""
    names = []
    for name, (kind, options) in inputs_of(node).items():
        if kind in SCALARS:
            names.append(name)
            names += [CONTROL] if options.get(CONTROL) else []
            names += ["upload"] if options.get("image_upload") else []
    return names


def is_allowed(value: object, kind: str, options: dict) -> bool:
    """Whether the server takes it. A file of the user's is not on the list of a server that has
    none."""
    match kind:
        case "COMBO":
            return value in options["options"] or Path(str(value)).suffix in FILES
        case "INT" | "FLOAT":
            number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(
                value, bool
            )
            return number and options.get("min", value) <= value <= options.get("max", value)
    return isinstance(value, bool if kind == "BOOLEAN" else str)


def test_the_template_list_has_them(server):
    assert sorted(server.get("/workflow_templates")["ComfyUI-PPCL"]) == [
        path.stem for path in WORKFLOWS
    ]
    for path in WORKFLOWS:
        for ending in ("json", "jpg"):
            name = urllib.parse.quote(f"{path.stem}.{ending}")
            with urllib.request.urlopen(
                f"{server.url}/api/workflow_templates/ComfyUI-PPCL/{name}"
            ) as answer:
                assert answer.status == 200


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_the_nodes(known, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    for node in nodes.values():
        if node["type"] in PAGE_ONLY:
            continue
        info = known[node["type"]]
        inputs, values, outputs = (
            inputs_of(info),
            node["widgets_values"],
            [o["type"] for o in node["outputs"]],
        )
        names, more = widgets_of(info)[: len(values)], widgets_of(info)[len(values) :]
        assert len(names) == len(values) and outputs == info["output"][: len(outputs)], node["type"]
        if node["type"].startswith("PPCL_"):
            assert not more and len(outputs) == len(info["output"]), node["type"]
        # what a newer host has added
        assert set(more) <= set(info["input"].get("optional", {})), node["type"]
        for name, value in zip(names, values, strict=True):
            assert is_allowed(value, *inputs.get(name, CHOSEN_BY_THE_PAGE)), (
                node["type"],
                name,
                value,
            )
        for slot, given in enumerate(node["inputs"]):
            assert inputs[given["name"]][0] == given["type"]
            if given["link"] is not None:
                _, source, out, target, place, kind = links[given["link"]]
                assert (target, place) == (node["id"], slot)
                assert nodes[source]["outputs"][out]["type"] == kind and given["type"] in (
                    kind,
                    "*",
                )
        required = {name for name in info["input"]["required"] if inputs[name][0] not in SCALARS}
        assert required <= {i["name"] for i in node["inputs"] if i["link"] is not None}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_api_form_is_the_same_workflow(known, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [
        node
        for node in workflow["nodes"]
        if node["type"] not in PAGE_ONLY and node["mode"] != MUTED
    ]
    assert [prompt[str(n["id"])]["class_type"] for n in nodes] == [
        n["type"] for n in nodes
    ] and len(prompt) == len(nodes)
    for node in nodes:
        values = dict(
            zip(widgets_of(known[node["type"]]), node["widgets_values"], strict=False)
        )  # a newer host has more
        values |= {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        ignored = (CONTROL, "upload")
        given = {k: v for k, v in prompt[str(node["id"])]["inputs"].items() if k != "preview"}
        assert given == {k: v for k, v in values.items() if k not in ignored}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_files_to_download_are_named_in_the_widgets(path):
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"] and model["url"].endswith(
                "/" + model["name"]
            )
            assert model["directory"] in (
                "diffusion_models",
                "text_encoders",
                "vae",
                "loras",
                "controlnet",
            )


def test_every_node_has_help_and_every_input_a_tooltip(server, ours):
    assert len(ours) >= 7
    for name, node in ours.items():
        with urllib.request.urlopen(
            f"{server.url}/extensions/ComfyUI-PPCL/docs/{name}.md"
        ) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {node['display_name']}\n") and node["description"]
        for given, (_, options) in inputs_of(node).items():
            assert options.get("tooltip"), f"{name}.{given} has no tooltip"
            assert re.sub(r"_\d$", "", given) in page, f"{name}.md says nothing of {given}"
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(ours)


def test_tooltips_say_what_the_command_line_says(ours):
    for (node, name), setting in SETTINGS.items():
        assert inputs_of(ours[node])[name][1]["tooltip"].endswith(
            setting_help(ImportConfig, setting)
        )


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
    found = {number: node for number, node in prompt.items() if node["class_type"] not in ENCODERS}
    for number, node in list(found.items()):
        inputs = node["inputs"]
        inputs |= {name: names[value] for name, value in inputs.items() if str(value) in names}
        match node["class_type"]:
            case "CLIPTextEncode":
                found[number] = {
                    "class_type": "PPCL_DemoCaption",
                    "inputs": {"captions": CAPTIONS.splitlines()[0]},
                }
            case "EmptySD3LatentImage":
                inputs |= {"width": 96, "height": 96}
            case "VAEDecode":
                found[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    entry = server.run(found)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save, info = (
        [n for n, node in found.items() if node["class_type"] == kind][0]
        for kind in ("SaveImage", "PPCL_Info")
    )
    assert len(entry["outputs"][save]["images"]) == 1 and len(entry["outputs"][info]["images"]) == 1


def test_the_edit_graph_runs_with_the_bundled_teacher(server):
    """As shipped: loaded switchable, a variant chosen, a reference in every forward. Exchanged:
    files, instructions for captions, pictures for latents, since the teacher has tables in place of
    a text encoder and a VAE."""
    prompt = shipped("ppcl-qwen-image-edit")
    gone = {"CLIPLoader", "VAELoader", "LoadImage", "FluxKontextImageScale", "VAEEncode"}
    found = {number: node for number, node in prompt.items() if node["class_type"] not in gone}
    instructions = [
        n for n, node in found.items() if node["class_type"] == "TextEncodeQwenImageEditPlus"
    ]
    for output, number in enumerate(instructions):
        given = {"conditioning": ["words", output], "latent": ["picture", 0]}
        found[number] = {"class_type": "ReferenceLatent", "inputs": given}
    size = {"width": 64, "height": 64, "length": 1, "batch_size": 1}
    found |= {
        "words": {
            "class_type": "PPCL_DemoCaption",
            "inputs": {"captions": CAPTIONS.splitlines()[0]},
        },
        "picture": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
    }
    for number, node in list(found.items()):
        inputs = node["inputs"]
        match node["class_type"]:
            case "PPCL_LoadModel":
                inputs |= {"file": "demo/demo.ppcl.safetensors", "base": TEACHER}
            case "KSampler":
                inputs |= {"latent_image": ["words", 2], "steps": 4}
            case "VAEDecode":
                found[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    entry = server.run(found)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save = next(number for number, node in found.items() if node["class_type"] == "SaveImage")
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
    found = {number: node for number, node in prompt.items() if node["class_type"] not in gone}
    for number, node in list(found.items()):
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
                found[number] = {"class_type": "PPCL_DemoCaption", "inputs": {"captions": CAPTIONS}}
            case "KSampler":
                inputs |= {
                    "positive": [words, 0],
                    "negative": [words, 1],
                    "latent_image": [words, 2],
                }
            case "VAEDecode":
                found[number] = {
                    "class_type": "PPCL_DemoDecode",
                    "inputs": {"latent": inputs["samples"], "enlarge": 4},
                }
    return found


def test_the_large_model_s_graph_runs_with_the_bundled_teacher(server):
    """Streamed and in bfloat16, as it is shipped."""
    prompt = quickly(with_the_bundled_teacher(shipped("ppcl-qwen-image-distil")))
    assert len(prompt) == len(shipped("ppcl-qwen-image-distil")) - 3
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    save = next(number for number, node in prompt.items() if node["class_type"] == "SaveImage")
    assert len(entry["outputs"][save]["images"]) == len(CAPTIONS.splitlines())
