"""The node pack from outside, without a host: what it imports, what it asks to be installed, what it ships."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted((ROOT / "nodes").rglob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "execution", "server"}
NEVER = {"subprocess", "socket", "requests", "urllib", "os", "pickle", "importlib"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_the_entry_imports_nothing_when_it_is_imported():
    """pytest collects it, and ComfyUI imports it before its own parts are ready."""
    body = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_pack_imports_itself_relatively():
    """An absolute `import ppcl_engine` would be a second copy of every class, `import nodes` the host's own."""
    for path in NODES:
        absolute = {module.split(".")[0] for level, module in imports_of(path) if level == 0}
        assert not absolute & {"ppcl_engine", "tests"}, path


def test_only_paths_asks_for_folders():
    asking = {path.name for path in NODES if any(module == "folder_paths" for _, module in imports_of(path))}
    assert asking == {"paths.py"}


def test_reading_knows_no_host():
    assert (
        not {module.split(".")[0] for level, module in imports_of(ROOT / "nodes" / "reading.py") if level == 0} & HOST
    )


def test_nothing_that_a_registry_refuses():
    for path in NODES:
        modules = {module.split(".")[0] for level, module in imports_of(path) if level == 0}
        assert not modules & NEVER, path
        called = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & NEVER_CALLED, path


def test_torch_is_the_hosts():
    names = [re.split(r"[<>=\[ ]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert "torch" not in names and {"diffusers", "safetensors"} <= set(names)


def test_tests_are_not_shipped():
    assert {"tests/", "benchmarks/", "runs/"} <= set((ROOT / ".comfyignore").read_text().split())
