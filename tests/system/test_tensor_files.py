"""The container format, against the safetensors library; files appear whole or not at all."""

import errno
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl_engine import open_model
from ppcl_engine.system.atomic import read_json, replacing, write_json
from ppcl_engine.system.hashes import CHUNK, TensorHash
from ppcl_engine.system.headers import DTYPES
from ppcl_engine.system.tensor_files import (
    TensorEntry,
    TensorFile,
    write_tensor_stream,
    write_tensors,
)


def equal_bits(left: dict, right: dict) -> bool:
    """NaN equals NaN: dtype, shape and bytes."""

    def bits(t):
        return t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist()

    return left.keys() == right.keys() and all(
        bits(left[name]) == bits(right[name]) for name in left
    )


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.float().to(dtype) if dtype.is_floating_point else values.to(dtype)


@pytest.fixture(scope="module")
def every_dtype():
    tensors = {
        f"{name}.{len(shape)}": sample(dtype, shape)
        for name, dtype in DTYPES.items()
        for shape in [(), (3,), (2, 0), (2, 3, 5)]
    }
    return tensors | {"transposed": torch.arange(6.0).reshape(2, 3).T}


def test_the_library_reads_what_we_write(tmp_path, every_dtype):
    write_tensors(tmp_path / "a", every_dtype, {"note": "é"})
    assert equal_bits(load_file(tmp_path / "a"), every_dtype)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata()["note"] == "é"


def test_we_read_what_the_library_writes(tmp_path, every_dtype):
    save_file(
        {name: t.contiguous() for name, t in every_dtype.items()}, tmp_path / "a", {"note": "é"}
    )
    file = TensorFile(tmp_path / "a")
    assert equal_bits(file.read_all(), every_dtype)
    assert file.metadata == {"note": "é"}
    assert {name: (file.dtype(name), file.shape(name)) for name in file.keys()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in every_dtype.items()
    }


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES), max_size=5),
    st.dictionaries(NAMES, st.text(max_size=4)),
)
def test_any_names_and_shapes_go_there_and_back(tmp_path_factory, parts, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {name: sample(dtype, shape) for name, (dtype, shape) in parts.items()}
    write_tensors(path, tensors, metadata)
    file = TensorFile(path)
    assert equal_bits(file.read_all(), tensors) and equal_bits(load_file(path), tensors)
    assert file.metadata == metadata


def container(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "empty": (b"", "no header"),
    "a few bytes": (b"abc", "no header"),
    "foreign": (b"abcd" + b"\xff" * 60, "no header"),
    "a PyTorch file": (b"PK\x03\x04" + b"\xff" * 60, "is a PyTorch file"),
    "GGUF": (b"GGUF" + b"\x03" * 60, "is a GGUF file"),
    "length beyond the file": (struct.pack("<Q", 99) + b"{}", "no header"),
    "not JSON": (container(b"{nonsense"), "bad header"),
    "not UTF-8": (container(b'{"\xff": 1}'), "bad header"),
    "a list": (container([1]), "bad header"),
    "no offsets": (container({"a": {"dtype": "F32", "shape": [2]}}), "bad header"),
    "an entry that is a word": (container({"a": "F32"}), "bad header"),
    "offsets that do not fit the shape": (container({"a": {**ENTRY, "shape": [3]}}), "bad header"),
    "offsets backwards": (container({"a": {**ENTRY, "data_offsets": [8, 0]}}), "bad header"),
    "metadata that is a number": (container({"__metadata__": 5, "a": ENTRY}), "bad header"),
    "metadata that holds numbers": (
        container({"__metadata__": {"a": 5}, "a": ENTRY}),
        "bad header",
    ),
    "nested without end": (container(b"[" * 20_000), "bad header"),
    "a number without end": (container(b'{"a": ' + b"9" * 10_000 + b"}"), "bad header"),
    "truncated": (container({"a": ENTRY}, b"\0" * 7), "truncated"),
    "longer than it says": (container({"a": ENTRY}, b"\0" * 9), "1 bytes behind its last tensor"),
    "two tensors in one place": (
        container({"a": ENTRY, "b": ENTRY}),
        "'b' overlaps the tensor before it",
    ),
    "bytes of no tensor": (
        container({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"\0" * 16),
        "leaves bytes before it",
    ),
    "a name twice": (container(b'{"a": 1, "a": 2}'), "the name 'a' stands twice"),
    "metadata that is a list": (
        container({"__metadata__": [1]}),
        "__metadata__ is not texts by name",
    ),
    "metadata of numbers": (
        container({"__metadata__": {"a": 1}}),
        "__metadata__ is not texts by name",
    ),
    "nested 20,000 deep": (
        container(b'{"a": ' + b"[" * 20000 + b"]" * 20000 + b"}"),
        "nested more than 64 deep",
    ),
    "nested 100 deep": (
        container(b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}"),
        "nested more than 64 deep",
    ),
    "NaN": (container(b'{"a": NaN}'), "NaN is not a finite number"),
    "sizes of 2^63": (
        container({"a": {**ENTRY, "shape": [2**63]}}),
        "shape is not a list of sizes",
    ),
    "a size that is true": (
        container({"a": {**ENTRY, "shape": [True, 2]}}),
        "shape is not a list of sizes",
    ),
    "a size as text": (container({"a": {**ENTRY, "shape": ["2"]}}), "shape is not a list of sizes"),
    "a digit too many": (container(b'{"a": ' + b"9" * 5000 + b"}"), "bad header"),
}


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, content, reason):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="pipe.safetensors is a named pipe"):
        TensorFile(tmp_path / "pipe.safetensors")


def test_a_dtype_we_do_not_know_hurts_only_when_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(
        container(
            {
                "odd": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
                "b": {**ENTRY, "shape": [1], "data_offsets": [4, 8]},
            }
        )
    )
    file = TensorFile(tmp_path / "a")
    assert file.read("b").tolist() == [0.0]
    with pytest.raises(ValueError, match="odd is F4"):
        file.read("odd")


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_the_folder_as_it_was(tmp_path, existing):
    path, tensor = tmp_path / "model.safetensors", torch.arange(4.0)
    if existing:
        write_tensors(path, {"a": tensor})

    def fails():
        raise RuntimeError("disk full")

    entries = [
        TensorEntry("a", torch.float32, (4,), lambda: tensor + 1),
        TensorEntry("b", torch.float32, (4,), fails),
    ]
    with pytest.raises(RuntimeError, match="disk full"):
        write_tensor_stream(path, entries)
    assert [p.name for p in tmp_path.iterdir()] == (["model.safetensors"] if existing else [])
    if existing:
        assert torch.equal(TensorFile(path).read("a"), tensor)


def test_a_stream_makes_one_tensor_at_a_time_in_order(tmp_path):
    made = []
    entries = [
        TensorEntry(n, torch.bfloat16, (2,), lambda n=n: made.append(n) or torch.ones(2))
        for n in "abc"
    ]
    write_tensor_stream(tmp_path / "a", entries)
    assert made == ["a", "b", "c"]
    assert TensorFile(tmp_path / "a").read("b").dtype == torch.bfloat16


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


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (TensorFile, read_json, open_model):
        with pytest.raises(
            ValueError, match="model.safetensors is a named pipe; give a regular file"
        ):
            read(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        TensorFile("/dev/zero")


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


def test_a_tensor_that_is_missing_is_one_line(tmp_path):
    write_tensors(tmp_path / "a", {"a": torch.ones(2)})
    for read in ("read", "shape", "dtype", "verify"):
        with pytest.raises(ValueError, match=r"/a lacks the tensor b; it is incomplete"):
            getattr(TensorFile(tmp_path / "a"), read)("b")


@pytest.mark.parametrize("how", ["replaced", "overwritten", "shorter"])
def test_who_opened_a_file_never_reads_another_one_in_its_place(tmp_path, how):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.zeros(4), "b": torch.ones(4)})
    file = TensorFile(path)
    write_tensors(tmp_path / "other", {"a": torch.ones(4), "b": torch.zeros(4)})
    if how == "replaced":
        os.replace(tmp_path / "other", path)
    else:
        path.write_bytes((tmp_path / "other").read_bytes()[: None if how == "overwritten" else -4])
        os.utime(path, ns=(1, 1))  # the clock of a file system may stand still between two writes
    with pytest.raises(
        ValueError, match="model.safetensors was replaced or changed while it was in use"
    ):
        file.read("a")


def test_what_another_process_is_writing_stays(tmp_path):
    """Of two writers of one file each has its own; what a dead one left goes."""
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
