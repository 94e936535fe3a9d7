"""Files appear whole or not at all, whoever else reads or writes them."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ppcl_engine.system.atomic import read_json, replacing, write_json
from ppcl_engine.system.tensor_files import TensorFile, write_tensors


def test_json_there_and_back_and_refused(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "a.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="a.json is not a JSON file"):
        read_json(tmp_path / "a.json")


def test_who_reads_the_old_file_keeps_it_whole_while_it_is_replaced(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.zeros(4)})
    content = path.read_bytes()
    with open(path, "rb") as reader:
        write_tensors(path, {"a": torch.ones(4)})
        assert reader.read() == content
    assert TensorFile(path).read("a").tolist() == [1.0] * 4


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_what_another_process_is_writing_stays(tmp_path):
    """Two writers of one file have a partial file each; one that a dead process left is removed."""
    path = tmp_path / "model.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with replacing(path) as mine:
            alive = path.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{other.pid}-"))
            elsewhere = path.with_name(f".model.json.{'0' * 8}-1-{'0' * 8}.partial")
            for partial in (alive, elsewhere):
                partial.write_text("half")
            with replacing(path) as second:
                assert second != mine
                second.write_text("second")
            mine.write_text("mine")
        assert path.read_text() == "mine" and alive.exists() and elsewhere.exists()
        other.communicate(b"\n")
    os.utime(elsewhere, (1, 1))
    path.with_name(f".model.json.{other.pid}.partial").write_text("of an earlier version")
    write_json(path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_two_threads_write_one_file(tmp_path):
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(4) as pool:
        for written in [pool.submit(write_json, path, [number] * 500) for number in range(40)]:
            written.result()
    assert len(set(read_json(path))) == 1 and [p.name for p in tmp_path.iterdir()] == ["a.json"]
