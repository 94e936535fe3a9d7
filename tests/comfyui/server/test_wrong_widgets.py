"""Anything that a program may post for an input of these nodes: a refusal by the server, or one line of
ours; no job begins."""

from __future__ import annotations

import itertools
import json

import pytest

from .conftest import eventually
from .graphs import TEACHER, Graph

FIRST = 5000  # numbers of these tests' nodes
EACH = 2  # wrong values of every input; which ones changes from input to input
NAN = float("nan")
LONG = "x" * 200_000
NESTED = {"a": {"b": [{"c": None}]}}
WRONG = {
    "INT": [
        "abc",
        None,
        NESTED,
        NAN,
        10**30,
        -(10**30),
        True,
        1.5,
        "",
        {"__value__": [1, 2, 3]},
        [1, 2, 3],
        "7",
    ],
    "FLOAT": [
        "abc",
        NAN,
        None,
        NESTED,
        float("inf"),
        "nan",
        -1e30,
        True,
        "",
        {"__value__": [1.0]},
        [1, 2, 3],
        10**400,
    ],
    "STRING": [
        None,
        5,
        NESTED,
        LONG,
        True,
        {"__value__": ["a", "b", "c"]},
        [1, 2, 3],
        "\0",
        "\ud800",
        NAN,
    ],
    "BOOLEAN": ["no", None, 7, NESTED, {"__value__": []}, [1, 2, 3], NAN],
    "COMBO": [
        "no such choice",
        5,
        None,
        NESTED,
        True,
        {"__value__": ["a", "b", "c"]},
        "",
        LONG,
        [1, 2, 3],
        NAN,
    ],
    "link": [5, "text", None, NESTED, True, {"__value__": [1, 2, 3]}, [1, 2, 3], [], NAN],
}
REFUSALS = {
    "invalid_input_type",
    "value_smaller_than_min",
    "value_bigger_than_max",
    "value_not_in_list",
    "bad_linked_input",
    "return_type_mismatch",
    "required_input_missing",
}
"""The server's own words for what it checks; an exception in this pack while it checks would be another
one."""
WITHOUT_A_JOB = {"start": False, "wait": False}


@pytest.fixture(scope="module")
def graph_of(known):
    """One of these nodes with inputs that fit, as far as there are any without a job; its number."""

    def make(kind: str) -> tuple[Graph, str]:
        graph = Graph(known, FIRST)
        sources = {
            "MODEL": [
                graph.add("PPCL_LoadModel", file="demo/demo.ppcl.safetensors", base=TEACHER),
                0,
            ],
            "LATENT": [graph.add("PPCL_DemoCaption"), 2],
            "IMAGE": [graph.add("EmptyImage", width=16, height=16), 0],
            "PPCL_RUN": "probe-00000000",
        }
        given = {}
        for name, (of, *_) in known[kind]["input"]["required"].items():
            if isinstance(of, str) and of in sources:
                given[name] = sources[of]
        given |= {
            name: value
            for name, value in WITHOUT_A_JOB.items()
            if name in known[kind]["input"]["required"]
        }
        number = graph.add(kind, **given)
        if not known[kind]["output_node"]:
            graph.text([number, len(known[kind]["output"]) - 1])
        return graph, number

    return make


def cases(known: dict) -> list[tuple[str, str, object]]:
    """(node, input, wrong value)"""
    found, turn = [], {kind: itertools.cycle(values) for kind, values in WRONG.items()}
    for kind in sorted(name for name in known if name.startswith("PPCL_")):
        rows = known[kind]["input"]
        for name, (of, *_) in {**rows.get("required", {}), **rows.get("optional", {})}.items():
            values = turn["COMBO" if isinstance(of, list) else of if of in WRONG else "link"]
            found += [(kind, name, next(values)) for _ in range(EACH)]
    return found


def said_of(entry: dict) -> tuple[str, str]:
    """(type of the exception, its line) of a prompt that has ended; ("", "") where it went well."""
    errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    return (
        (errors[0]["exception_type"], errors[0]["exception_message"].strip())
        if errors
        else ("", "")
    )


def test_every_input_of_every_node(server, known, graph_of):
    """The server checks and converts what it can before a node sees it; what comes through gets
    one line from the node."""
    queued, refused, wrong = {}, 0, []
    for kind, name, value in cases(known):
        graph, number = graph_of(kind)
        graph.nodes[number]["inputs"][name] = value
        answer = server.post("/prompt", {"prompt": graph.nodes})
        if answer.get("node_errors"):
            types = {
                error["type"] for node in answer["node_errors"].values() for error in node["errors"]
            }
            refused += 1
            wrong += (
                [] if types <= REFUSALS else [(kind, name, repr(value)[:60], answer["node_errors"])]
            )
        else:
            queued[answer["prompt_id"]] = (kind, name, value)
    eventually(lambda: not any(server.get("/queue").values()), "the server did not finish in time")
    named = 0
    for prompt_id, (kind, name, value) in queued.items():
        error, line = said_of(server.get(f"/history/{prompt_id}")[prompt_id])
        named += line.startswith(f"{known[kind]['display_name']}: {name} ")
        if error not in ("", "ValueError") or "\n" in line or len(line) > 600:
            wrong.append((kind, name, repr(value)[:60], error, line[:200]))
    assert not wrong, f"{len(wrong)} of {len(queued) + refused}: {wrong[:5]}"
    assert refused > 100 and named > 50, (refused, named, len(queued))
    states = [
        json.loads(path.read_text())
        for path in (server.base / "output" / "ppcl").glob("*/state.json")
    ]
    assert not [state for state in states if state["status"] in ("running", "stopping")]


def test_a_link_to_the_wrong_type(server, graph_of):
    graph, number = graph_of("PPCL_Info")
    graph.nodes[number]["inputs"]["model"] = [graph.add("PPCL_DemoCaption"), 2]
    errors = server.post("/prompt", {"prompt": graph.nodes})["node_errors"][number]["errors"]
    assert [error["type"] for error in errors] == ["return_type_mismatch"]


@pytest.mark.parametrize(
    "kind, name, value, line",
    [
        ("PPCL_Detect", "bootstrap", NAN, None),
        (
            "PPCL_DistillDepth",
            "learning_rate",
            NAN,
            "Distil Depth (PPCL): learning_rate is nan; give a number from 0 to 1",
        ),
        (
            "PPCL_Probe",
            "run",
            NESTED,
            "Probe (PPCL): run is {'a': {'b': [{'c': None}]}}; connect it to an output of the type PPCL_RUN",
        ),
        (
            "PPCL_Info",
            "model",
            "text",
            "Pruned Model Info (PPCL): model is 'text'; connect it to an output of the type MODEL",
        ),
        (
            "PPCL_DemoCaption",
            "captions",
            LONG,
            "Demo Caption (PPCL): captions has 200,000 characters; give at most 100,000",
        ),
    ],
)
def test_in_one_line(server, graph_of, kind, name, value, line):
    """None: the server itself refuses it."""
    graph, number = graph_of(kind)
    graph.nodes[number]["inputs"][name] = value
    if line is None:
        assert server.post("/prompt", {"prompt": graph.nodes})["node_errors"]
    else:
        assert server.error_of(graph.nodes).strip() == line
