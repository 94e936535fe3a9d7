"""What is not a header of a safetensors file is said in one line that names the file."""

import json
import struct

import pytest

from ppcl_engine.system.tensor_files import TensorFile


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
    "a name twice": (container(b'{"a": 1, "a": 2}'), "the name 'a' occurs twice"),
    "metadata that is a list": (
        container({"__metadata__": [1]}),
        "__metadata__ is not an object of texts",
    ),
    "metadata of numbers": (
        container({"__metadata__": {"a": 1}}),
        "__metadata__ is not an object of texts",
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
