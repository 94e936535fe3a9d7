"""Captions, prompts and run files as people save them; errors name the file, and the byte."""

from __future__ import annotations

import os
import random

import pytest

from ppcl_engine.__main__ import read_run_file
from ppcl_engine.data.picture_files import caption_file, picture_files
from ppcl_engine.settings.base_settings import from_mapping
from ppcl_engine.settings.prune_settings import ProbeConfig
from ppcl_engine.system.texts import MOST_BYTES, lines_of, read_text

RUN = "[probe]\nmodel = 'm'\nrun = 'r'\n"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa red cat\r\n\r\na blue dog\r\n")
    assert caption_file(path) == ["a red cat", "", "a blue dog"]
    path.write_text(RUN, encoding="utf-8-sig")
    assert [stage for stage, _ in read_run_file(path)] == ["probe"]
    (tmp_path / "a.png").write_bytes(b"")
    path.write_text("a red cat\n", encoding="utf-8-sig")
    assert picture_files(tmp_path) == [(tmp_path / "a.png", "a red cat")]


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "one\u2028still one\n two\x0cstill two \nthree\x85\x1c\u2029three\x0b"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert caption_file(tmp_path / "a.txt") == [
        "one\u2028still one",
        "two\x0cstill two",
        "three\x85\x1c\u2029three",
    ]
    assert (
        lines_of("a\n\nb\n") == ["a", "", "b"]
        and lines_of("a\n\n") == ["a", ""]
        and lines_of("") == []
    )


def test_line_ends_of_old_macs_are_refused(tmp_path, line_of):
    path = tmp_path / "a.txt"
    for text, line in (("a cat\ra dog\r", 1), ("[probe]\r\nmodel = 1\rrun = 2\n", 2)):
        path.write_bytes(text.encode())
        said = (
            f"{path}: line {line} has a carriage return in it; save it with line feeds (LF or CRLF)"
        )
        with pytest.raises(ValueError) as caught:
            caption_file(path)
        assert str(caught.value) == said and line_of("run", path) == f"ppcl: {said}"


WRONG = {
    "UTF-16 with a mark": (" a cat".encode("utf-16"), "is UTF-16 (its first bytes are ff fe)"),
    "UTF-16, the other way": (b"\xfe\xff\x00a", "is UTF-16 (its first bytes are fe ff)"),
    "UTF-16 without a mark": (
        "a cat".encode("utf-16-le"),
        "is UTF-16 or not text: byte 1 (line 1) is 0x00",
    ),
    "cp1252": (b"a cat\na caf\xe9\n", "is not UTF-8: byte 11 (line 2) is 0xe9"),
    "cp1252 behind a mark": (b"\xef\xbb\xbfcaf\xe9", "is not UTF-8: byte 6 (line 1) is 0xe9"),
}


@pytest.mark.parametrize("content, line", WRONG.values(), ids=WRONG)
def test_another_encoding_is_named_with_its_file_and_byte(tmp_path, line_of, content, line):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    (tmp_path / "a.png").write_bytes(b"")
    for read in (lambda: caption_file(path), lambda: picture_files(tmp_path)):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(caught.value) == f"{path} {line}; save it as UTF-8"
    assert line_of("run", path) == f"ppcl: {path} {line}; save it as UTF-8"


def test_what_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is not a file; give a text file"):
            caption_file(path)
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="has 100,000,001 bytes, too many for a text"):
        read_text(tmp_path / "huge.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="is empty; write one caption a line"):
        caption_file(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    "path", [r"C:\models\x", r"C:\Users\me", r"D:\x41", r"C:\new\table", "C:\\temp"]
)
def test_paths_of_windows_in_double_quotes(tmp_path, line_of, path):
    file = tmp_path / "run.toml"
    file.write_text(f'[probe]\nrun = "r"\nmodel = "{path}"\n')
    line = line_of("run", file)
    assert line.startswith(f"ppcl: {file}") and r"single quotes, as 'C:\models\x'" in line
    file.write_text(f"[probe]\nrun = 'r'\nmodel = '{path}'\n")
    ((_, config),) = read_run_file(file)
    assert str(config.model) == path


def test_other_faults_of_toml_get_no_such_hint(tmp_path, line_of):
    for text in (
        "[probe\n",
        'a = "b\n',
        "a = " + "[" * 5000,
        "a = " + "9" * 5000,
        "a = 1\na = 2\n",
    ):
        (tmp_path / "run.toml").write_text(text)
        assert "single quotes" not in line_of("run", tmp_path / "run.toml")


def test_a_path_has_no_control_characters():
    with pytest.raises(ValueError, match=r"here: model = 'a\\x00b' has a control character in it"):
        from_mapping(ProbeConfig, {"model": "a\0b", "run": "r"}, "here")


@pytest.mark.parametrize(
    "tiny", ["tiny = 3", "[tiny]\nteacher = []\nblocks = 3", "[tiny]\nteacher = 'qwen'\nblocks = 0"]
)
def test_tiny_tables_that_say_nothing(tmp_path, line_of, tiny):
    (tmp_path / "run.toml").write_text(f"{tiny}\n{RUN}")
    assert "tiny" in line_of("run", tmp_path / "run.toml", "--tiny")


def test_random_damage_of_a_run_file_is_one_line(tmp_path, capsys):
    """Nothing is started: the model does not exist."""
    rng, path = random.Random(0), tmp_path / "run.toml"
    text = f"{RUN}ridge = 0.5\nstreamed = true\n[detect]\nmodel = 'm'\nrun = 'r'\nprotect = '1 2'\n".encode()
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_run_file(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), damaged
