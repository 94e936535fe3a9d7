"""The container format, against the safetensors library; what was opened is what is read."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
