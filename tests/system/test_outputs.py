"""What a path given for writing may be: said before the work starts, and nothing but a file is ever
replaced."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from ppcl_engine.demo.bundled import TEACHER
from ppcl_engine.system.atomic import replacing, write_text
from ppcl_engine.system.outputs import check_file, check_folder

from ..tiny.demo_drawing import drawing


@pytest.fixture
def no_file(tmp_path):
    """A pipe, and a link to a device that is always full."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/full")
    return tmp_path / "pipe.png", tmp_path / "device.png"


def test_a_device_is_not_replaced(line_of, no_file):
    pipe, device = no_file
    for path in no_file:
        assert (
            line_of(*drawing(path))
            == f"ppcl: {path} is a device or a pipe, not a file; give another path"
        )
    with pytest.raises(ValueError, match="is a device or a pipe"):
        write_text(device, "text")
    with pytest.raises(ValueError, match="is a device or a pipe"):
        write_text(pipe, "text")
    assert pipe.is_fifo() and device.is_symlink() and stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize(
    "name, line",
    [
        (".", "is a folder; give the name of a file in it"),
        ("", "--output is empty; give a path"),
        ("sub", "is a folder"),
        ("sub/", "is a folder"),
        ("new/", "--output 'new/' is a folder; give the name of a file in it"),
        ("new.png/", "--output 'new.png/' is a folder"),
        ("/", "is a folder"),
        ("a.gif", "is not the name of a picture; let it end in .png, .jpg, .jpeg"),
        ("picture", "is not the name of a picture"),
        ("model.safetensors", "is not the name of a picture"),
        ("text/a.png", "text is not a folder; give another path"),
        ("text/b/a.png", "cannot be made, since .*text is not a folder"),
    ],
)
def test_a_picture_s_path(line_of, tmp_path, monkeypatch, name, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "text").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    found = line_of(*drawing(name))
    assert re.search(line, found)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "text").read_text() == "a file"


def test_an_error_of_a_library_without_a_number_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="broken data stream"), replacing(tmp_path / "a.png"):
        raise OSError("broken data stream")


@pytest.mark.parametrize("stage", ["probe", "fold", "demo", "import", "sparsify", "export"])
def test_a_run_folder_that_is_none(line_of, tmp_path, stage):
    (tmp_path / "file").write_text("a file")
    model = {"probe": "--model", "export": "--model", "demo": None}.get(stage, "--path")
    options = [model, TEACHER] if model else []
    assert (
        line_of(stage, *options, "--run", tmp_path / "file")
        == f"ppcl: {tmp_path / 'file'} is not a folder; give another path"
    )
    found = line_of(stage, *options, "--run", tmp_path / "file" / "below")
    assert (
        f"{tmp_path / 'file' / 'below'} cannot be made, since {tmp_path / 'file'} is not a folder"
        in found
    )
    assert line_of(stage, *options, "--run", "") == "ppcl: --run is empty; give a path"
    assert line_of(stage, *options, "--run=") == "ppcl: --run is empty; give a path"
    assert (tmp_path / "file").read_text() == "a file"


def test_a_run_file_s_empty_path(line_of, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[probe]\nmodel = 'm'\nrun = ''\n")
    assert line_of("run", path).endswith("[probe]: run is empty; give a path")


def test_what_can_be_written(tmp_path, monkeypatch):
    check_file(tmp_path / "new")
    check_folder(tmp_path / "a" / "b" / "c")
    (tmp_path / "old").write_text("x")
    check_file(tmp_path / "old")
    (tmp_path / "link").symlink_to("gone")  # it is replaced, as ever
    check_file(tmp_path / "link")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written"):
        check_folder(tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists() and Path("relative").parent == Path(".")
    check_folder(Path("relative"))
