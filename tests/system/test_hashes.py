"""What is read is compared with what was stored: a changed file is told by its tensor."""

from __future__ import annotations

import json
import os
import signal
import struct

import pytest
import torch
from safetensors.torch import save_file

from ppcl_engine.system.hashes import CHUNK, TensorHash
from ppcl_engine.system.tensor_files import TensorFile, write_tensors


def test_a_forked_process_writes_large_tensors_too(tmp_path):
    """A thread that its parent started for them would not be there."""
    large = {"a": torch.zeros(64 << 20, dtype=torch.uint8)}
    write_tensors(tmp_path / "parent.safetensors", large, {})
    child = os.fork()
    if not child:
        signal.alarm(20)  # rather than wait for ever
        write_tensors(tmp_path / "child.safetensors", large, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(TensorFile(tmp_path / "child.safetensors").read("a"), large["a"])


def data_of(path) -> int:
    """Where tensors begin."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def rewritten(path, change) -> None:
    """With `change(header)`, all else as it was."""
    content, start = path.read_bytes(), data_of(path)
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.unlink()  # another file, not the same one changed within a tick of its clock
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[start:])


def swap(header: dict) -> None:
    header["a"], header["b"] = header["b"], header["a"]


DAMAGES = {
    "names of equal shape swapped": (swap, "[ab] does not have the hash"),
    "F32 as I32": (lambda header: header["a"].update(dtype="I32"), "a does not have the hash"),
    "another shape": (lambda header: header["a"].update(shape=[4, 1]), "a does not have the hash"),
    "another name": (
        lambda header: header.update(c=header.pop("a")),
        "tensor '[ac]' is missing, or has no hash",
    ),
    "metadata": (
        lambda header: header["__metadata__"].update(note="no"),
        "its metadata 'note' does not have the hash",
    ),
}


@pytest.mark.parametrize("change, reason", DAMAGES.values(), ids=DAMAGES)
def test_a_header_that_was_changed_is_found(tmp_path, change, reason):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.rand(2, 2), "b": torch.rand(2, 2)}, {"note": "yes"})
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"model.safetensors: .*{reason}"):
        TensorFile(path).read_all()


@pytest.mark.parametrize("rows", [None, 1])
def test_one_flipped_bit_in_a_tensor_is_found_once_for_each_file(tmp_path, rows):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.rand(3, 4), "b": torch.rand(2, 2)})
    content = bytearray(path.read_bytes())
    content[data_of(path) + 40] ^= 1  # in the last row of a
    path.unlink()
    path.write_bytes(content)
    file = TensorFile(path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model.safetensors: a does not have the hash that was stored with it"
        ):
            file.read("a", rows)
    assert file.read("b").shape == (2, 2)
    content[data_of(path) + 40] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert TensorFile(path).read("a", rows).shape[1] == 4


def test_what_was_checked_is_not_hashed_again(tmp_path, monkeypatch):
    path, made = tmp_path / "model.safetensors", []
    write_tensors(path, {"a": torch.rand(3, 4), "b": torch.rand(2, 2)})
    monkeypatch.setattr(
        "ppcl_engine.system.tensor_files.TensorHash",
        lambda *about: made.append(about[0]) or TensorHash(*about),
    )
    for _ in range(2):
        file = TensorFile(path)
        file.read("a", 1, 1), file.read("a"), file.read("b")
    assert made == ["a", "b"]


def test_a_large_tensor_is_hashed_while_it_is_read(tmp_path):
    path, tensor = tmp_path / "model.safetensors", torch.arange(CHUNK + 3)
    write_tensors(path, {"a": tensor})
    assert torch.equal(TensorFile(path).read("a"), tensor)
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a does not have the hash"):
        TensorFile(path).read("a")


def test_files_without_hashes_are_read_as_before(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a", {"note": "old"})
    file = TensorFile(tmp_path / "a")
    assert file.read("a").tolist() == [1, 1] and not file.has_hashes
    file.verify("a")
