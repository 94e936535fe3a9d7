"""Who may import whom, read from the source; and importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ppcl_engine

ROOT = Path(ppcl_engine.__file__).parent
STAGES = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
METHOD = {
    "calibrate", "probe", "detect", "distill_depth", "detect_width", "distill_width", "polish", "variants", "finetune"
}  # they exchange files, never code  # fmt: skip
LIGHT = {"config", "config_files", "plan"}  # the command line's help and a plan's reader come without torch


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, `from . import x` and names inside functions included."""
    package = ("ppcl_engine", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = {str(path.relative_to(ROOT)): imports_of(path) for path in sorted(ROOT.rglob("*.py"))}


def test_the_reader_sees_imports():
    assert "ppcl_engine.similarity.NormalEquations" in FILES["stages/probe.py"]
    assert "ppcl_engine.flow" in FILES["data.py"] and "torch" in FILES["files.py"]
    assert METHOD <= STAGES


@pytest.mark.parametrize("stage", sorted(METHOD))
def test_stages_of_the_method_never_import_a_stage(stage):
    assert {name for name in FILES[f"stages/{stage}.py"] if ".stages" in name} == set()


def test_nothing_imports_comfy():
    """The engine serves a command line too; ComfyUI's packages are the nodes' business."""
    hosts = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution"}
    assert {file: names for file, names in FILES.items() if {n.split(".")[0] for n in names} & hosts} == {}


def test_the_core_does_not_import_stages_or_the_command_line():
    core = [f for f in FILES if "/" not in f and f != "__main__.py"] + [
        f for f in FILES if f.startswith("architectures/")
    ]
    for file in core:
        assert not any(n.startswith("ppcl_engine.stages") or n == "ppcl_engine.__main__" for n in FILES[file]), file


def test_architectures_know_only_themselves():
    for file in (f for f in FILES if f.startswith("architectures/")):
        ours = {n for n in FILES[file] if n.startswith("ppcl_engine")}
        assert all(n.startswith("ppcl_engine.architectures") for n in ours), file


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_import_the_standard_library_only(module):
    others = {n for n in FILES[f"{module}.py"] if not n.startswith("ppcl_engine.config")}
    assert {n.split(".")[0] for n in others} <= set(sys.stdlib_module_names)


def test_files_imports_only_what_replaces_files_whole():
    """And how 2:4 lies on disk, which imports nothing of ours."""
    ours = {n for n in FILES["files.py"] if n.startswith("ppcl_engine")}
    assert ours and all(n.startswith(("ppcl_engine.atomic", "ppcl_engine.sparsity.compressed")) for n in ours)
    assert not any(n.startswith("ppcl_engine") for n in FILES["sparsity/compressed.py"])


def test_accelerate_is_imported_when_several_processes_were_launched():
    """By one function; one process does without."""
    assert [file for file, names in FILES.items() if any(n.split(".")[0] == "accelerate" for n in names)] == [
        "parallel.py"
    ]
    tree = ast.parse((ROOT / "parallel.py").read_text(encoding="utf-8"))
    assert not any(
        "accelerate" in ast.dump(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    )


def test_importing_does_not_import_torch_and_prints_nothing():
    code = (
        "import sys, ppcl_engine, ppcl_engine.config, ppcl_engine.plan; from ppcl_engine import PruningPlan; "
        "sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_looking_at_jobs_does_not_import_torch():
    """ComfyUI imports the nodes at its start, and they import these."""
    modules = ", ".join(f"ppcl_engine.jobs.{name}" for name in ("state", "order", "launch", "store"))
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'diffusers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_file_starts_processes():
    starting = {
        file for file, names in FILES.items() if {n.split(".")[0] for n in names} & {"subprocess", "multiprocessing"}
    }
    assert starting == {"jobs/launch.py"}


def test_only_the_command_line_s_side_knows_jobs():
    """Stages are heard by a listener; they know no job."""
    knowing = {file for file, names in FILES.items() if any(n.startswith("ppcl_engine.jobs") for n in names)}
    assert {file for file in knowing if not file.startswith("jobs/")} == set()


def test_an_unknown_attribute_is_an_error():
    assert ppcl_engine.open_model and ppcl_engine.PruningPlan
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        ppcl_engine.prune  # noqa: B018
