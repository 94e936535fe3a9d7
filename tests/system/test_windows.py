"""What differs on Windows (docs/windows.md), each with the call that fails there made to fail here."""

from __future__ import annotations

import errno
import io
import os
import sys
from types import SimpleNamespace

import pytest

from ppcl_engine.jobs import launch, reuse
from ppcl_engine.system import atomic, early, user_errors
from ppcl_engine.system.atomic import read_json, write_json


def windows(**calls: object) -> SimpleNamespace:
    """`os` of a module, as there."""
    return SimpleNamespace(**{**vars(os), "name": "nt", **calls})


@pytest.mark.parametrize("times, replaced", [(3, True), (1000, False)])
def test_a_file_that_somebody_reads_is_replaced_a_moment_later(
    tmp_path, monkeypatch, times, replaced
):
    path, tried = tmp_path / "state.json", []
    write_json(path, 1)

    def busy(source, target) -> None:
        tried.append(source)
        if len(tried) <= times:
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        os.replace(source, target)

    monkeypatch.setattr(atomic, "os", windows(replace=busy))
    monkeypatch.setattr(atomic, "WINDOWS_WAIT", 0.0)
    if replaced:
        write_json(path, 2)
    else:
        with pytest.raises(PermissionError):
            write_json(path, 2)
    assert read_json(path) == (2 if replaced else 1)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_without_the_right_to_link_files_are_copied(tmp_path, monkeypatch):
    def refused(source, target) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    source, target = tmp_path / "probes" / "0.safetensors", tmp_path / "new" / "0.safetensors"
    source.parent.mkdir()
    source.write_bytes(b"probe")
    monkeypatch.setattr(reuse, "os", windows(link=refused))
    reuse.take(source, target)
    assert target.read_bytes() == b"probe" and os.stat(source).st_nlink == 1


def test_a_console_that_knows_few_letters_gets_codes(monkeypatch):
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    early.print_any_letter()
    print("caption: 猫 … é")
    assert written.getvalue().rstrip() == "caption: \\u732b … é".encode("cp1252")


def test_a_path_that_is_too_long_is_said_to_be(monkeypatch):
    monkeypatch.setattr(user_errors, "os", windows())
    long = OSError(errno.ENOENT, "No such file or directory", "C:\\" + "a" * 300)
    assert user_errors.line_of(long).endswith(
        "Windows takes paths of 259 characters; move the folder up, or turn on long paths"
    )
    short = OSError(errno.ENOENT, "No such file or directory", "C:\\a")
    assert "259" not in user_errors.line_of(short)


def test_a_command_to_copy_is_quoted_as_its_shell_reads_it(monkeypatch):
    monkeypatch.setattr(launch, "os", windows())
    words = ["C:\\Program Files\\python.exe", "C:\\runs\\a b"]
    assert launch._quoted(words) == '"C:\\Program Files\\python.exe" "C:\\runs\\a b"'
