"""What a page may send and what a folder may hold: one clear line, nothing outside the runs, and
the next prompt works."""

import json
import math

import pytest

from .conftest import NOT_IN_LIST
from .graphs import TEACHER, Graph

# what is refused, and in which words, is our own; that each host passes it on is tried by test_wrong_widgets.py
pytestmark = pytest.mark.any_host
LONG = "x" * 5000
# without a run before them
ALONE = {"CalibrateFromPrompts": {"prompts": "a red K"}, "WatchJob": {}, "CancelJob": {}}
BEFORE = {"FineTune": "width", "Export": "width"}


@pytest.fixture(scope="module")
def finished(server, made):
    """The name of the run of a kind."""
    return lambda kind: next((server.base / "output" / "ppcl").glob(f"{kind}-*")).name


@pytest.fixture
def nothing_else_changes(server, made):
    """Files of the server's folder, but for its own databases, logs and pictures, and runs that are
    named as ours are."""

    def files() -> set[str]:
        paths = {str(p.relative_to(server.base)) for p in server.base.rglob("*") if p.is_file()}
        return {p for p in paths if not p.startswith(("user/", "temp/", "log.txt", "output/ppcl/"))}

    before = files()
    yield
    assert files() == before
    names = [path.name for path in (server.base / "output" / "ppcl").iterdir()]
    assert all(name.isascii() and name.replace("-", "").isalnum() for name in names)


def node(known: dict, kind: str, **inputs) -> dict:
    graph = Graph(known, 900)
    graph.add(f"PPCL_{kind}", **inputs)
    return graph.nodes


@pytest.mark.parametrize(
    "run",
    [
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "C:\\x",
        "; rm -rf /",
        LONG,
        "probe-00000000",
        "\x00",
        17,
        {"a": 1},
    ],
)
@pytest.mark.parametrize("kind", ["Probe", "PrepareRun"])
def test_forged_runs(server, known, kind, run, nothing_else_changes):
    """A page sends links; a program can send anything."""
    message = server.error_of(node(known, kind, run=run)).strip()
    assert "\n" not in message and len(message) < 400
    assert any(
        words in message for words in ("is not the name of a run", "is not in", "connect it")
    ), message


@pytest.mark.parametrize(
    "kind, widgets, message",
    [
        (
            "CalibrateFromPrompts",
            {"model_file": "../../../etc/passwd"},
            "is neither in models/ppcl nor in models/diffusion_models",
        ),
        (
            "CalibrateFromPrompts",
            {"model_file": "/etc/passwd"},
            "is neither in models/ppcl nor in models/diffusion_models",
        ),
        (
            "CalibrateFromPrompts",
            {"prompts": "  \n "},
            "0 prompts are given; write 1 to 10,000, one a line",
        ),
        ("CalibrateFromPrompts", {"prompts": "x" * 200_000}, "prompts has 200,000 characters"),
        ("CalibrateFromPrompts", {"guidance": math.nan}, "guidance is nan; give a number"),
        ("CalibrateFromPrompts", {"dtype": "float16; ls"}, "dtype 'float16; ls' is not a choice"),
        (
            "CalibrateFromPrompts",
            {"device": "cuda:0; rm -rf ~"},
            "'cuda:0; rm -rf ~' is not a device",
        ),
        ("Detect", {"method": "../x"}, "method '../x' is not a choice"),
        ("EditPlan", {"intervals": "$(ls)"}, "'$(ls)' is not an interval"),
        ("EditPlan", {"sites": "../../x:1"}, "is not a width site"),
        ("DistillDepth", {"intervals": "9-1"}, "interval '9-1' is not in the plan"),
        ("DistillWidth", {"choose": "by magic"}, "choose 'by magic' is not a choice"),
        ("DistillWidth", {"choose": "by name", "sites": " "}, "sites is empty"),
        ("FineTune", {"name": "../../evil"}, "name '../../evil': letters, digits"),
        ("Export", {"name": "../../evil"}, "name '../../evil': letters, digits"),
        ("Export", {"name": LONG}, "letters, digits"),
        ("Export", {"store": "q8_0"}, "store q8_0 is not for layout bundle; use layout gguf"),
        (
            "Sparsify",
            {"sparsity": 0.0},
            "sparsity 0 is not a share of weights to drop; choose a number between 0 and 1",
        ),
        (
            "Sparsify",
            {"sparsity": 1.0},
            "sparsity 1 is not a share of weights to drop; choose a number between 0 and 1",
        ),
        ("Sparsify", {"pattern": "2:4", "sparsity": 0.6}, "2:4 drops 0.5 of the weights"),
        ("Sparsify", {"pattern": "3:4"}, "pattern '3:4' is not a choice; choose from"),
        ("Sparsify", {"score": "../x"}, "score '../x' is not a choice"),
        (
            "Sparsify",
            {"file": "../../../etc/passwd"},
            "is neither in models/ppcl nor in models/diffusion_models",
        ),
        ("Sparsify", {"variant": "small"}, "has no variant 'small'; leave the variant out"),
        ("Sparsify", {"name": "../../evil"}, "name '../../evil': letters, digits"),
        ("PrepareRun", {}, "is done, so it cannot be started by hand"),
        ("WatchJob", {"run_name": "../../x"}, "is not the name of a run"),
        ("CancelJob", {"run_name": "/etc"}, "is not the name of a run"),
    ],
)
def test_hostile_widgets(server, known, finished, kind, widgets, message, nothing_else_changes):
    """All are refused before a process starts, some of them by the host itself."""
    given = {} if kind in ALONE else {"run": finished(BEFORE.get(kind, "detect"))}
    found = server.error_of(
        node(known, kind, **{**given, **ALONE.get(kind, {}), **widgets})
    ).strip()
    assert (
        (message in found or found.startswith(NOT_IN_LIST))
        and "\n" not in found
        and "--" not in found
    ), found


def test_numbers_that_no_widget_reaches(server, known):
    """These the server refuses by itself."""
    for value in (math.inf, -1.0, 1e30):
        queued = server.post(
            "/prompt", {"prompt": node(known, "CalibrateFromPrompts", prompts="a", guidance=value)}
        )
        assert queued["node_errors"]


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "null",
        '{"status": "happy"}',
        '{"status": "running", "pid": "7"}',
        "x" * 200_000,
        "[" * 50_000,
        '{"status": "failed", "error": "' + "<script>alert(1)</script>\\n" * 1000 + '"}',
    ],
)
def test_rubbish_in_a_runs_folder(server, known, state):
    """Someone else's file: the list stays, the run is a line, the others go on."""
    folder = server.base / "output" / "ppcl" / "junk-00000000"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps({"version": 1, "stages": [["probe", {"model": TEACHER}]]})
    )
    (folder / "state.json").write_text(state)
    entry = server.run(node(known, "WatchJob", run_name="junk-00000000", wait=False))
    if entry["status"]["status_str"] == "error":
        assert (
            "\n"
            not in server.error_of(
                node(known, "WatchJob", run_name="junk-00000000", wait=False)
            ).strip()
        )
    names = server.get("/object_info/PPCL_WatchJob")["PPCL_WatchJob"]["input"]["required"][
        "run_name"
    ][1]["options"]
    assert "junk-00000000" in names
    found = server.run(
        node(
            known, "WatchJob", run_name=next(n for n in names if n.startswith("probe")), wait=False
        )
    )
    assert found["status"]["status_str"] == "success"
