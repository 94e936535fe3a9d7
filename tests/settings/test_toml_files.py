"""A TOML file that is nested without end, or holds numbers without end, is refused at once."""

from __future__ import annotations

import time

import pytest

from ppcl_engine.settings.toml_files import MOST_BYTES, read_tables

KEY = ".".join(["a"] * 30_000)
WRONG = {
    "a long key": (f"x = 1\n{KEY} = 1", "line 2 is nested more than 64 deep; write"),
    "a long header": (f"[{KEY}]", "line 1 is nested more than 64 deep"),
    "a long key, in quotes": (
        "x = {" + KEY.replace("a", '"b "') + " = 1}",
        "line 1 is nested more",
    ),
    "lists": ("a = " + "[" * 20_000, "is nested more than 64 deep"),
    "tables": ("a = " + "{a=" * 5000, "is nested more than 64 deep"),
    "digits": ("a = " + "9" * 5000, "a number has too many digits"),
    "size": ("#" * (MOST_BYTES + 1), "has 1,000,001 bytes, too many for a text"),
}


@pytest.mark.parametrize("text, said", WRONG.values(), ids=WRONG)
def test_what_never_ends_is_refused_at_once(tmp_path, text, said):
    path, start = tmp_path / "run.toml", time.monotonic()
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_tables(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and said in line and "sys." not in line
    assert time.monotonic() - start < 5


def test_numbers_and_paths_with_many_points_are_no_long_keys(tmp_path):
    path = tmp_path / "run.toml"
    timesteps = " ".join(f"0.{n:03}" for n in range(900))
    path.write_text(f"[fold]\ntimesteps = '{timesteps}'\nrun = '../../../a.b.c/d'\n")
    assert read_tables(path)["fold"]["timesteps"] == timesteps


def test_run_says_that_it_needs_a_file(line_of):
    assert line_of("run", "--tiny") == "ppcl: run needs a file; write ppcl run FILE"
