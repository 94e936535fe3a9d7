"""Tar shards as webdataset lays them out: names with braces, samples in order, damage in one line."""

from __future__ import annotations

import pytest

from ppcl_engine.data import shards
from ppcl_engine.data.shards import samples, shard_files, write_shard

ROWS = [("000", {"txt": b"a", "jpg": b"1"}), ("001", {"txt": b"b", "jpg": b"2"})]


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "00.tar", ROWS)
    return tmp_path / "00.tar"


def test_braces_name_files_as_a_shell_does(tmp_path):
    for name in ("a_08", "a_09", "a_10", "b_08", "b_09", "b_10"):
        (tmp_path / f"{name}.tar").touch()
    found = shard_files(f"{tmp_path}/{{b,a}}_{{08..10}}.tar")
    assert [path.stem for path in found] == ["b_08", "b_09", "b_10", "a_08", "a_09", "a_10"]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("none/{00..09}.tar", "none/{00..09}.tar matches no file"),
        ("{00..02}.tar", r"01.tar does not exist \(2 of 3 shards"),
        ("{5..2}.tar", "matches no file"),
        ("{0..999999999}.tar", "names more than 10 files"),
    ],
)
def test_a_pattern_without_its_files_is_refused(shard, pattern, message, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SHARDS", 10)
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        shard_files(f"{shard.parent}/{pattern}")


def test_samples_come_in_order_with_all_their_files(shard):
    assert [sample for _, sample in samples([shard, shard])] == [row for _, row in ROWS * 2]


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    write_shard(tmp_path / "again.tar", ROWS)
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("cut", [3, 700, 1600], ids=["begin", "content", "header"])
def test_a_broken_shard_is_named_in_one_line(shard, cut):
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(ValueError, match="00.tar is not a whole tar file .*again") as caught:
        list(samples([shard]))
    assert "\n" not in str(caught.value)


def test_webdataset_reads_them(shard):
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert [(row["__key__"], row["txt"], row["jpg"]) for row in found] == [
        ("000", b"a", b"1"),
        ("001", b"b", b"2"),
    ]
