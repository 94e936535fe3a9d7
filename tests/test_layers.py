"""Who may import whom, read from the source, imports inside functions included; and importing costs
nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ppcl_engine
from ppcl_engine.stages import STAGES

ROOT = Path(ppcl_engine.__file__).parent
PACK = ROOT.parent

ENGINE = (  # top floor first: a room imports itself and what stands on the floors below
    ("entry",),
    ("__main__", "jobs"),
    ("demo",),
    ("stages",),
    ("estimate", "report"),
    ("algorithms",),
    ("__init__",),
    ("models", "data"),
    ("run", "architectures"),
    ("plan",),
    ("settings",),
    ("system",),
)
NODES = (  # under nodes/, the same way; all of them may import the engine
    ("__init__",),
    ("catalogue",),
    ("use", "make"),
    ("node",),
    ("sampling",),
    ("loading",),
    ("host",),
    ("paths", "widgets", "pictures"),
    ("checks", "listing"),
)
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "matplotlib",
    "PIL",
    "safetensors",
    "accelerate",
}


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACK).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, `from . import x` and names inside functions
    included."""
    package = path.relative_to(PACK).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):  # an absolute `nodes` is the host's
            found |= {alias.name for alias in node.names if alias.name != "nodes"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = {
    ".".join(module_of(path)): imports_of(path)
    for top in ("ppcl_engine", "nodes")
    for path in sorted((PACK / top).rglob("*.py"))
}


def modules_of(name: str) -> set[str]:
    """The files of ours that a file imports. A name of a room's __init__ is an import of that
    __init__."""
    names = FILES[name]
    found = {n for n in names if n in FILES}
    for module in names - found:
        parent = module.rpartition(".")[0]
        if parent in FILES:
            found.add(parent)
    # `from .room import file` names the room too, and imports nothing of it
    rooms = {n for n in found if any(o.startswith(f"{n}.") for o in names & FILES.keys())}
    used = {m.rpartition(".")[0] for m in names if m not in FILES}
    return (found - (rooms - used)) - {name}


GRAPH = {name: modules_of(name) for name in FILES}


def room_of(name: str) -> str:
    """The first folder, or file, under ppcl_engine/ or nodes/."""
    return (name.split(".") + ["__init__"])[1]


def floor_of(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    return next(number for number, rooms in enumerate(floors) if room_of(name) in rooms)


@pytest.mark.parametrize(
    ("top", "floors"), [("ppcl_engine", ENGINE), ("nodes", NODES)], ids=["engine", "nodes"]
)
def test_every_import_points_down(top, floors):
    files = {name for name in FILES if name.split(".")[0] == top}
    assert {room_of(name) for name in files} <= {room for rooms in floors for room in rooms}
    upward = set()
    for name in files:
        for other in GRAPH[name] & files:
            if room_of(other) != room_of(name) and floor_of(other, floors) <= floor_of(
                name, floors
            ):
                upward.add(f"{name} -> {other}")
    assert upward == set()


def reached(graph: dict[str, set[str]], name: str) -> set[str]:
    """What a file imports, and what that imports in turn."""
    seen, waiting = set(), [name]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of files of which each reaches every other."""
    reach = {name: reached(graph, name) for name in graph}
    return {frozenset(o for o in reach[n] if n in reach[o]) for n in graph if n in reach[n]}


def test_no_file_reaches_itself():
    assert not circles(GRAPH)


def test_the_reader_sees_imports():
    assert (
        "ppcl_engine.algorithms.least_squares.NormalEquations"
        in FILES["ppcl_engine.stages.prune.probe"]
    )
    assert "torch" in FILES["ppcl_engine.system.tensor_files"]
    assert "ppcl_engine.data.flow" in GRAPH["ppcl_engine.data.calibration"]
    assert "ppcl_engine.estimate.needs" in GRAPH["ppcl_engine.jobs.attempt"]  # in a function
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {frozenset("bc")}


STAGE_FILES = sorted(
    name for name in FILES if name.startswith("ppcl_engine.stages.") and name.count(".") == 3
)


@pytest.mark.parametrize("stage", STAGE_FILES)
def test_stages_never_import_a_stage(stage):
    """They exchange files, never code."""
    assert GRAPH[stage] & set(STAGE_FILES) == set()


def test_stages_are_files_of_the_stages_rooms():
    outside = {
        name
        for name, (_, module) in STAGES.items()
        if f"ppcl_engine.stages.{module}" not in STAGE_FILES
    }
    assert outside == {"demo"}  # which runs all others, and stands above them


def test_nothing_of_the_engine_imports_comfy():
    """The engine serves a command line too; ComfyUI's packages are the nodes' business."""
    hosts = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution"}
    engine = {file: names for file, names in FILES.items() if file.startswith("ppcl_engine")}
    assert {
        file: names for file, names in engine.items() if {n.split(".")[0] for n in names} & hosts
    } == {}


def test_architectures_know_only_themselves():
    for file in (f for f in FILES if f.startswith("ppcl_engine.architectures")):
        assert all(other.startswith("ppcl_engine.architectures") for other in GRAPH[file]), file


def test_settings_and_plan_come_without_torch():
    """The command line's help and a plan's reader need no more than these, and what they import in
    turn."""
    rooms = {
        name for name in FILES if name.startswith(("ppcl_engine.plan", "ppcl_engine.settings"))
    }
    light = rooms.union(*(reached(GRAPH, name) for name in rooms))
    assert {n.split(".")[0] for name in light for n in FILES[name]} & HEAVY == set()


def test_accelerate_is_imported_when_several_processes_were_launched():
    """By one function; one process does without."""
    assert [
        file for file, names in FILES.items() if any(n.split(".")[0] == "accelerate" for n in names)
    ] == ["ppcl_engine.system.distributed"]
    tree = ast.parse((ROOT / "system" / "distributed.py").read_text(encoding="utf-8"))
    assert not any(
        "accelerate" in ast.dump(node)
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def test_importing_does_not_import_torch_and_prints_nothing():
    code = (
        "import sys, ppcl_engine, ppcl_engine.stages, ppcl_engine.plan; from ppcl_engine import PruningPlan; "
        "sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_looking_at_jobs_does_not_import_torch():
    """ComfyUI imports the nodes at its start, and they import these."""
    modules = ", ".join(f"ppcl_engine.jobs.{name}" for name in ("state", "spec", "launch", "store"))
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'diffusers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_file_starts_processes():
    starting = {
        file
        for file, names in FILES.items()
        if {n.split(".")[0] for n in names} & {"subprocess", "multiprocessing"}
    }
    assert starting == {"ppcl_engine.jobs.launch"}


def test_an_unknown_attribute_is_an_error():
    assert ppcl_engine.open_model and ppcl_engine.PruningPlan
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        ppcl_engine.prune  # noqa: B018


def names_in(tree: ast.Module) -> set[str]:
    """What a file binds at its top, under an `if` or `try` there too."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            names |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        else:
            waiting += ast.iter_child_nodes(node)
    return names


def test_every_name_that_is_imported_is_there():
    """In the nodes too, which nothing but a ComfyUI can import."""
    there = {"ppcl_engine.open_model", "ppcl_engine.PruningPlan", *FILES}  # the first two are lazy
    for top in ("ppcl_engine", "nodes"):
        for path in (PACK / top).rglob("*.py"):
            module = ".".join(module_of(path))
            there |= {
                f"{module}.{name}" for name in names_in(ast.parse(path.read_text(encoding="utf-8")))
            }
    ours = {
        name
        for names in FILES.values()
        for name in names
        if name.split(".")[0] in ("ppcl_engine", "nodes")
    }
    assert ours - there == set()


PAGE = (PACK / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_on_where_things_are_names_every_room():
    named = {name.split("/")[0].removesuffix(".py") for name in re.findall(r"`([\w/.]+)`", PAGE)}
    rooms = {room for floor in (*ENGINE, *NODES) for room in floor}
    assert (
        rooms - {"__init__", "entry", "node", "paths", "widgets", "pictures", "checks", "listing"}
        <= named
    )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+(?:/|\.py))`", PAGE))))
def test_what_the_page_names_is_there(path):
    tops = (PACK, ROOT, PACK / "nodes", ROOT / "algorithms", ROOT / "algorithms" / "detection")
    assert any((top / path).exists() for top in (*tops, ROOT / "stages", ROOT / "system"))
