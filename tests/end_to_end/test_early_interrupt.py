"""Ctrl-C in the first seconds, while libraries are read: one line, exit code 130, no traceback."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ppcl_engine
from ppcl_engine.system import early

ROOT = Path(ppcl_engine.__file__).parent
MOMENTS = (0.0, 0.1, 0.5)  # seconds from our first instruction on; torch comes at about 0.1
FIRST = "import os; from ppcl_engine.system import early; w = early.watch; early.watch = lambda: (w(), os.write(1, b'.')); "
WAYS = {
    "module": "import runpy; runpy.run_module('ppcl_engine', run_name='__main__', alter_sys=True)",
    "script": "import sys; from ppcl_engine import entry; sys.exit(entry.main())",
}


def interrupted(way: str, moment: float, first: str = FIRST) -> tuple[int, str]:
    """Exit code and stderr of a command that takes seconds, interrupted `moment` seconds after our
    first instruction."""
    code = f"{first}import sys; sys.argv = ['ppcl', 'inspect', '--architectures']; {WAYS[way]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdout.read(1) == "."
    time.sleep(moment)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    return child.returncode, said


@pytest.mark.parametrize("way, moment", [*(("module", m) for m in MOMENTS), ("script", 0.0)])
def test_control_c_is_one_line(way, moment):
    code, said = interrupted(way, moment)
    assert code == early.INTERRUPTED
    assert len(said.split("\n")) <= 3 and "Traceback" not in said
    assert re.fullmatch(r"\n?ppcl: stopped.*\n", said)


def test_of_several_processes_the_first_one_says_it():
    code, said = interrupted("module", 0.0, f"{FIRST}os.environ['RANK'] = '1'; ")
    assert (code, said) == (early.INTERRUPTED, "")


def test_where_it_is_turned_off_it_stays_off():
    """As behind `nohup ppcl ... &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        early.watch()
        early.begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_hears_it_as_any_program_does():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        early.watch()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        early.begin()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


FROM_TEXT = """
import os, signal, sys
from ppcl_engine.system.early import INTERRUPTED, finish
try:
    exec("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)")
except KeyboardInterrupt:
    code = INTERRUPTED
sys.exit(finish(code))
"""
ENDING = """
import atexit, os, signal, sys
from ppcl_engine.system.early import finish, watch
watch()
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.exit(finish(2))
"""


@pytest.mark.parametrize("code, expected", [(FROM_TEXT, early.INTERRUPTED), (ENDING, 2)])
def test_the_exit_code_is_ours_whenever_it_comes(code, expected):
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (expected, "")


def test_the_package_itself_imports_nothing_first():
    package = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    first = [node for node in package.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in first] == ["__future__"]


def test_nothing_comes_before_it():
    """In the module that is run, and in what the script imports."""
    start = [
        n
        for n in ast.parse((ROOT / "__main__.py").read_text(encoding="utf-8")).body
        if not _says_nothing(n)
    ]
    assert ast.unparse(start[0]).splitlines()[1:] == [
        "    from .system.early import start",
        "    start()",
    ]
    imports = [
        n
        for n in ast.walk(ast.parse((ROOT / "system" / "early.py").read_text(encoding="utf-8")))
        if isinstance(n, ast.Import)
    ]
    assert {alias.name for node in imports for alias in node.names} == {"os", "signal", "sys"}
    project = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^ppcl = "ppcl_engine\.(\w+\.)*entry:main"$', project, re.MULTILINE)


def _says_nothing(node: ast.stmt) -> bool:
    """The docstring, and `from __future__`."""
    return isinstance(node, ast.Expr) or (
        isinstance(node, ast.ImportFrom) and node.module == "__future__"
    )


def test_threads_wait_asleep_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    early.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    early.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
