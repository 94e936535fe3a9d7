"""2:4 on disk: there and back is the same matrix, and a file that holds it is read as if it were
dense."""

import pytest
import torch

from ppcl_engine.algorithms.sparsity.patterns import kept_of_groups, pattern_named
from ppcl_engine.system.tensor_files import TensorFile, write_tensors
from ppcl_engine.system.two_of_four import INDICES, VALUES, compress, decompress, decompressed


def sparse(rows: int = 6, columns: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return dense.masked_fill(~kept_of_groups(dense.abs(), pattern_named("2:4")), 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [4, 8, 12, 32])
def test_there_and_back(dtype, columns):
    dense = sparse(columns=columns, dtype=dtype)
    dense[0] = 0
    dense[1, 1:] = 0  # fewer than two in every group
    values, indices = compress(dense)
    assert values.shape == (6, columns // 2) and indices.shape == (6, -(-columns // 8))
    assert torch.equal(decompress(values, indices), dense)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_there_and_back_on_a_gpu(dtype):
    dense = sparse(columns=32).to(dtype)
    values, indices = compress(dense.float())
    found = decompress(values.to(dtype).cuda(), indices.cuda())
    assert torch.equal(found.cpu().float(), dense.float())


def test_two_bits_an_index_the_first_lowest():
    dense = torch.tensor([[0.0, 1, 0, 2, 3, 0, 4, 0]])
    values, indices = compress(dense)
    assert values.tolist() == [[1, 2, 3, 4]] and indices.tolist() == [
        [1 + (3 << 2) + (0 << 4) + (2 << 6)]
    ]


def test_what_is_not_two_of_four_is_refused():
    with pytest.raises(ValueError, match="more than two weights"):
        compress(torch.ones(1, 4))


@pytest.fixture
def file(tmp_path):
    values, indices = compress(sparse())
    tensors = {"a.weight" + VALUES: values, "a.weight" + INDICES: indices, "b": torch.ones(3)}
    write_tensors(tmp_path / "file", {**tensors, "a.weight": torch.zeros(0, 1)})
    return TensorFile(tmp_path / "file")


def test_a_file_is_read_as_dense(file):
    assert sorted(file.keys()) == ["a.weight", "b"]
    assert file.shape("a.weight") == (6, 20) and file.dtype("a.weight") == torch.float32
    assert torch.equal(file.read("a.weight"), sparse())
    assert torch.equal(file.read("a.weight", rows=2, start=3), sparse()[3:5])
    assert file.read_all()["b"].tolist() == [1, 1, 1]


def test_values_without_their_indices(tmp_path):
    values, indices = compress(sparse())
    for others in ({}, {"w" + INDICES: indices[:2]}, {"w" + INDICES: indices.int()}):
        write_tensors(tmp_path / "file", {"w" + VALUES: values, **others})
        with pytest.raises(
            ValueError,
            match="w is compressed as 2:4, but its indices are missing or of another shape",
        ):
            TensorFile(tmp_path / "file")


def test_what_another_reader_left_compressed():
    values, indices = compress(sparse())
    tensors = {
        "a.weight" + VALUES: values,
        "a.weight" + INDICES: indices,
        "a.weight": torch.zeros(0, 1),
        "b": values,
    }
    found = decompressed(tensors)
    assert found.keys() == {"a.weight", "b"} and torch.equal(found["a.weight"], sparse())
    shape = decompressed(tensors, shapes_only=True)["a.weight"]
    assert shape.is_meta and shape.shape == (6, 20)
    assert decompressed({"b": values})["b"] is values
