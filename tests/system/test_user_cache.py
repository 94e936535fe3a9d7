"""Figures of the machine are kept between runs, and nothing hangs on them."""

from __future__ import annotations

import json
import time

import pytest

from ppcl_engine.system import user_cache
from ppcl_engine.system.user_cache import FOLDER, KEPT, MOST, cache_folder, remembered


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine.json"


def never() -> float:
    raise AssertionError("measured again")


def test_a_figure_is_measured_once_a_week(file, monkeypatch):
    assert remembered("a", lambda: 2.5) == 2.5 == remembered("a", never)
    assert remembered("b", lambda: 7.0) == 7.0 and remembered("a", never) == 2.5
    later = time.time() + KEPT + 1
    monkeypatch.setattr(user_cache.time, "time", lambda: later)
    assert remembered("a", lambda: 3.0) == 3.0 == remembered("a", never)
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"a": 3}', '{"a": {"value": -1.0, "at": 0.0}}', '{"a": {"value": "x"}}'],
)
def test_a_damaged_file_is_made_anew(file, text):
    file.parent.mkdir()
    file.write_text(text)
    assert remembered("a", lambda: 2.5) == 2.5 == remembered("a", never)


def test_without_a_folder_to_write_it_is_measured_each_time(file, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert remembered("a", lambda: 2.5) == 2.5 and remembered("a", lambda: 3.5) == 3.5


def test_the_file_stays_small(file):
    for number in range(MOST + 20):
        remembered(f"figure {number}", lambda: 1.0)
    kept = json.loads(file.read_text())
    assert len(kept) == MOST and f"figure {MOST + 19}" in kept and "figure 0" not in kept


@pytest.mark.parametrize(
    "platform, variable, expected",
    [
        ("linux", "XDG_CACHE_HOME", "ppcl"),
        ("win32", "LOCALAPPDATA", "ppcl"),
        ("darwin", "HOME", "Library/Caches/ppcl"),
    ],
)
def test_the_folder_is_the_operating_systems(monkeypatch, tmp_path, platform, variable, expected):
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(user_cache.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_folder() == tmp_path / expected
