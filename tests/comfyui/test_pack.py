"""The node pack from outside, without a host: what it imports, what it asks to be installed, what
it ships."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted((ROOT / "nodes").rglob("*.py"))
PACK = [ROOT / "__init__.py", *NODES, *sorted((ROOT / "ppcl_engine").rglob("*.py"))]
LAUNCHER = ROOT / "ppcl_engine" / "jobs" / "launch.py"
NETWORK = {
    "socket",
    "ssl",
    "requests",
    "urllib",
    "http",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "websocket",
    "websockets",
}
SHELLS = {
    "system",
    "popen",
    "spawnl",
    "spawnv",
    "spawnve",
    "execv",
    "execve",
    "execvp",
    "getoutput",
    "getstatusoutput",
}
LARGE = 2_000_000  # bytes
DEMO_FILES = {
    f"ppcl_engine/demo/{name}.safetensors" for name in ("teacher", "teacher_flux", "demo.ppcl")
}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "execution",
    "server",
}
NEVER = {"subprocess", "socket", "requests", "urllib", "os", "pickle", "importlib"}
HEAVY = {
    "diffusers",
    "matplotlib",
    "transformers",
    "accelerate",
    "scipy",
    "torchvision",
    "rapidocr",
}  # seconds of a start
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


def imported_at_once(path: Path) -> tuple[set[str], set[Path]]:
    """(other packages, files of this repository) that importing a file imports; not what its functions import
    when they are called."""
    others, ours = set(), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [folder, *(folder / alias.name for alias in node.names)]
            ours |= {
                f for n in names for f in (n.with_suffix(".py"), n / "__init__.py") if f.is_file()
            }
    return others, ours


def test_a_start_of_the_host_imports_nothing_heavy():
    waiting, seen = (
        [ROOT / "nodes" / "catalogue.py", ROOT / "nodes" / "host" / "__init__.py"],
        set(),
    )
    while waiting:
        path = waiting.pop()
        others, ours = imported_at_once(path)
        assert not others & HEAVY, (path, others & HEAVY)
        seen.add(path)
        waiting += ours - seen
    assert {
        ROOT / "nodes" / "use" / "load_model.py",
        ROOT / "ppcl_engine" / "models" / "bundle.py",
    } <= seen


def test_the_pack_imports_itself_relatively():
    """An absolute `import ppcl_engine` would be a second copy of every class, `import nodes` the
    host's own."""
    for path in NODES:
        absolute = {module.split(".")[0] for level, module in imports_of(path) if level == 0}
        assert not absolute & {"ppcl_engine", "tests"}, path


def test_only_paths_asks_for_folders():
    asking = {
        path.name
        for path in NODES
        if any(module == "folder_paths" for _, module in imports_of(path))
    }
    assert asking == {"paths.py"}


def test_reading_knows_no_host():
    for name in ("__init__", "request", "from_bundle", "from_file"):
        path = ROOT / "nodes" / "loading" / f"{name}.py"
        assert not {module.split(".")[0] for level, module in imports_of(path) if level == 0} & HOST


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
    names = [
        re.split(r"[<>=\[ ]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert "torch" not in names and {"diffusers", "safetensors"} <= set(names)


def calls_of(path: Path) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_one_file_of_the_whole_pack_starts_processes():
    """Its command is this interpreter, the worker's file and a folder of this repository."""
    starting = {
        path for path in PACK if any(m.split(".")[0] == "subprocess" for _, m in imports_of(path))
    }
    # the store names a type of it
    assert starting - {ROOT / "ppcl_engine" / "jobs" / "store.py"} == {LAUNCHER}
    popen = [
        call
        for call in calls_of(LAUNCHER)
        if getattr(call.func, "attr", "") in ("Popen", "run", "call")
    ]
    assert [ast.unparse(call.args[0]) for call in popen] == [
        "[sys.executable, str(WORKER), str(folder)]"
    ]
    assert not any(keyword.arg in ("shell", "env") for keyword in popen[0].keywords)
    assert not [
        c
        for c in calls_of(ROOT / "ppcl_engine" / "jobs" / "store.py")
        if ast.unparse(c.func).startswith("subprocess")
    ]


def test_no_shell_no_network_no_evaluated_text_in_the_whole_pack():
    for path in PACK:
        modules = {module.split(".")[0] for _, module in imports_of(path)}
        assert not modules & (NETWORK | {"marshal", "pip"}), path
        # it reads tensors alone (weights_only)
        assert "pickle" not in modules or path.name == "pickled_files.py"
        for call in calls_of(path):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            assert name not in NEVER_CALLED, path
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in (
                "os",
                "subprocess",
            ):
                assert call.func.attr not in SHELLS, path


def test_no_widget_reaches_a_command():
    """Nodes know the launcher's two functions: stop a process, show a command."""
    imported = {
        alias.name
        for path in NODES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("jobs.launch")
        for alias in node.names
    }
    assert imported == {"stop", "prepared_command"}


def shipped_files() -> list[str]:
    """What the registry's zip would hold: tracked files, less what .comfyignore names."""

    def listed(*options: str) -> set[str]:
        return set(
            subprocess.check_output(["git", "ls-files", *options], cwd=ROOT, text=True).splitlines()
        )

    return sorted(listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_what_is_shipped():
    files = shipped_files()
    tops = {name.split("/")[0] for name in files}
    assert not tops & {"tests", "benchmarks", "docs", "runs", ".ci", "Makefile", ".venv", ".hosts"}
    assert {
        "__init__.py",
        "nodes",
        "ppcl_engine",
        "web",
        "workflows",
        "pyproject.toml",
        "requirements.txt",
    } <= tops
    assert {n for n in files if (ROOT / n).stat().st_size > LARGE} <= DEMO_FILES
    assert not [
        n
        for n in files
        if n.endswith((".pt", ".pth", ".bin", ".pkl", ".exe", ".so", ".whl", ".zip"))
    ]
    for kind, page in (("workflows", ".json"), ("web/docs", ".md")):
        assert [n for n in files if n.startswith(kind) and n.endswith(page)]


PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_chinese_page_says_what_the_english_one_says(page):
    """ComfyUI's page looks for <node>/<language>.md first. Names of inputs, values and nodes stay as they
    are, and none is left out."""
    english = page.read_text(encoding="utf-8")
    chinese = (page.with_suffix("") / "zh.md").read_text(encoding="utf-8")
    assert chinese.splitlines()[0] == english.splitlines()[0]
    named = re.compile(r"\*\*([\w ,]+?)\*\*|`([^`\n]+)`")
    words = {"".join(found) for found in named.findall(english)}
    assert {word for word in words if word not in chinese} == set()
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > len(english) / 12


def test_tests_are_not_shipped():
    assert {"tests/", "benchmarks/", "runs/"} <= set((ROOT / ".comfyignore").read_text().split())


def test_one_range_of_hosts_everywhere():
    """What the nodes say on an unknown host, README, the registry and the page of tested hosts."""
    body = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8")).body
    (tested,) = (
        ast.literal_eval(n.value)
        for n in body
        if isinstance(n, ast.Assign) and n.targets[0].id == "TESTED"
    )
    for name in ("README.md", "pyproject.toml", "docs/hosts.md"):
        assert all(version in (ROOT / name).read_text(encoding="utf-8") for version in tested), name
