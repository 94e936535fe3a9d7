"""What is shipped for the page: templates fit the server's nodes; each node has its help and tooltips."""

import json
import re
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from ppcl_engine.settings.convert_settings import ImportConfig
from ppcl_engine.settings.help_texts import setting_help

from .conftest import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"), key=lambda path: path.stem)
SCALARS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
PAGE_ONLY = {"MarkdownNote"}
CONTROL = "control_after_generate"
CHOSEN_BY_THE_PAGE = (
    "COMBO",
    {"options": ["fixed", "increment", "decrement", "randomize", "image"]},
)
FILES = (".safetensors", ".png")
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet")
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
    inputs = {}
    for name, (kind, *more) in rows.items():
        options = more[0] if more else {}
        inputs[name] = (
            (kind, options) if isinstance(kind, str) else ("COMBO", {**options, "options": kind})
        )
    return inputs


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


def workflow_in(path: Path) -> tuple[list[dict], dict[int, list]]:
    """(its nodes, but for those of the page alone, and its links by their numbers)"""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = [node for node in workflow["nodes"] if node["type"] not in PAGE_ONLY]
    return nodes, {link[0]: link for link in workflow["links"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_widgets_of_a_workflow_fit_the_nodes(known, path):
    nodes, _ = workflow_in(path)
    for node in nodes:
        info, kind, values = known[node["type"]], node["type"], node["widgets_values"]
        inputs = inputs_of(info)
        names, more = widgets_of(info)[: len(values)], widgets_of(info)[len(values) :]
        assert len(names) == len(values), kind
        # widgets that a newer host has added
        assert set(more) <= set(info["input"].get("optional", {})), kind
        assert not more or not kind.startswith("PPCL_"), kind
        for name, value in zip(names, values, strict=True):
            assert is_allowed(value, *inputs.get(name, CHOSEN_BY_THE_PAGE)), (kind, name, value)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_links_of_a_workflow_fit_the_nodes(known, path):
    nodes, links = workflow_in(path)
    by_number = {node["id"]: node for node in nodes}
    for node in nodes:
        info, inputs = known[node["type"]], inputs_of(known[node["type"]])
        outputs = [output["type"] for output in node["outputs"]]
        assert outputs == info["output"][: len(outputs)], node["type"]
        if node["type"].startswith("PPCL_"):
            assert len(outputs) == len(info["output"]), node["type"]
        for slot, given in enumerate(node["inputs"]):
            assert inputs[given["name"]][0] == given["type"]
            if given["link"] is not None:
                _, source, output, target, target_slot, kind = links[given["link"]]
                assert (target, target_slot) == (node["id"], slot)
                assert by_number[source]["outputs"][output]["type"] == kind
                assert given["type"] in (kind, "*")
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
    assert len(prompt) == len(nodes)
    assert [prompt[str(n["id"])]["class_type"] for n in nodes] == [n["type"] for n in nodes]
    for node in nodes:
        values = dict(
            zip(widgets_of(known[node["type"]]), node["widgets_values"], strict=False)
        )  # a newer host has more
        values |= {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        ignored = (CONTROL, "upload")
        given = {k: v for k, v in prompt[str(node["id"])]["inputs"].items() if k != "preview"}
        assert given == {k: v for k, v in values.items() if k not in ignored}


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda p: p.stem)
def test_a_blueprint_is_listed_and_fits_the_nodes(server, known, path):
    """A subgraph that newer pages offer among the nodes."""
    (key,) = [k for k, row in server.get("/global_subgraphs").items() if row["name"] == path.stem]
    (graph,) = json.loads(server.get(f"/global_subgraphs/{key}")["data"])["definitions"][
        "subgraphs"
    ]
    links = {link["id"]: link for link in graph["links"]}
    for node in graph["nodes"]:
        info, values = known[node["type"]], node["widgets_values"]
        assert len(widgets_of(info)) == len(values), node["type"]
        for name, value in zip(widgets_of(info), values, strict=True):
            assert is_allowed(value, *inputs_of(info)[name]), (node["type"], name, value)
        for slot, given in enumerate(node["inputs"]):
            assert inputs_of(info)[given["name"]][0] == given["type"]
            if given["link"] is not None:
                link = links[given["link"]]
                assert (link["target_id"], link["target_slot"]) == (node["id"], slot)
                assert link["type"] == given["type"]


@pytest.mark.parametrize("name", ["ppcl-demo-three-sizes", "ppcl-demo-in-one-node"])
def test_app_mode_shows_widgets_and_results_that_are_there(known, name):
    """What newer pages read of `extra`: widgets by node and name, and nodes with a result."""
    path = ROOT / "workflows" / f"{name}.json"
    nodes, chosen = workflow_in(path)[0], json.loads(path.read_text())["extra"]["linearData"]
    kinds = {node["id"]: known[node["type"]] for node in nodes}
    assert chosen["inputs"] and all(w in widgets_of(kinds[n]) for n, w in chosen["inputs"])
    assert chosen["outputs"] and all(kinds[n]["output_node"] for n in chosen["outputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_files_to_download_are_named_in_the_widgets(path):
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"] in MODEL_FOLDERS


def test_every_node_has_help_and_every_input_a_tooltip(server, ours):
    assert len(ours) >= 7
    for name, node in ours.items():
        with urllib.request.urlopen(
            f"{server.url}/extensions/ComfyUI-PPCL/docs/{name}.md"
        ) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {node['display_name']}\n")
        assert node["description"], name
        for given, (_, options) in inputs_of(node).items():
            assert options.get("tooltip"), f"{name}.{given} has no tooltip"
            assert re.sub(r"_\d$", "", given) in page, f"{name}.md says nothing of {given}"
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(ours)


def test_tooltips_say_what_the_command_line_says(ours):
    for (node, name), setting in SETTINGS.items():
        assert inputs_of(ours[node])[name][1]["tooltip"].endswith(
            setting_help(ImportConfig, setting)
        )
