"""Tables: joined, compacted, written and read; what is not a table, or another model's, is one
line."""

import pytest
import torch

from ppcl_engine.models.folding.tables import Table, batches_of, read_table, rows_of, write_table
from ppcl_engine.system.tensor_files import write_tensors


def table(timesteps, batches=(1,), names=("a", "b"), offset: float = 0.0) -> Table:
    """Column (t, batch) holds t + batch / 1000."""
    rows = torch.tensor([t + b / 1000 for b in batches for t in timesteps])
    return Table(
        tuple(timesteps),
        tuple(batches),
        {n: rows.expand(3, -1) + offset + i for i, n in enumerate(names)},
    )


def test_joined_keeps_every_value_in_its_place():
    found = table((1.0, 0.5)).joined(table((0.5, 0.25)))
    assert found.timesteps == (1.0, 0.5, 0.25) and found.batches == (1,)
    torch.testing.assert_close(found.columns["a"][0], torch.tensor([1.001, 0.501, 0.251]))
    torch.testing.assert_close(found.columns["b"][0], torch.tensor([2.001, 1.501, 1.251]))


def test_joined_with_other_numbers_of_rows():
    found = table((1.0,)).joined(table((0.5,), (1, 2)))
    assert found.batches == (1, 2)
    torch.testing.assert_close(found.columns["a"][0], torch.tensor([1.001, 0.501, 1.001, 0.502]))
    back = table((0.5,), (1, 2)).joined(table((1.0,)))
    torch.testing.assert_close(back.columns["a"][0], torch.tensor([0.501, 1.001, 0.502, 1.001]))


def test_only_some_in_this_order():
    found = table((1.0, 0.5, 0.25), (1, 2)).only((0.25, 1.0))
    assert found.timesteps == (0.25, 1.0)
    torch.testing.assert_close(found.columns["a"][0], torch.tensor([0.251, 1.001, 0.252, 1.002]))


def test_compact_drops_what_equals_the_first():
    one = table((1.0, 0.5), (1,))
    twice = Table(
        (1.0, 0.5),
        (1, 2, 4),
        {n: torch.cat([c, c, c + (n == "b")], dim=1) for n, c in one.columns.items()},
    )
    found = twice.compact()
    assert found.batches == (1, 4) and found.columns["a"].shape == (3, 4)
    assert torch.equal(found.columns["b"][:, 2:], one.columns["b"] + 1)


def test_lacks():
    found = table((1.0, 0.5))
    assert not found.lacks((0.5,)) and found.lacks((0.5, 0.25))


def test_rows_of_plain_and_edit_models(architecture):
    edit = {**architecture.tiny_config, "zero_cond_t": True}
    assert rows_of(architecture, architecture.tiny_config, (1, 3)) == (1, 3)
    assert batches_of(architecture, architecture.tiny_config, (1, 3)) == [(1, 1), (3, 3)]
    assert rows_of(architecture, edit, (1, 3)) == (1, 2, 3, 6)
    assert batches_of(architecture, edit, (1, 2, 3, 6)) == [(2, 1), (2, 2), (6, 3), (6, 6)]


def test_written_and_read(tmp_path):
    found = table((1.0, 0.3), (1, 2))
    write_table(tmp_path / "t.safetensors", found, "key")
    again = read_table(tmp_path / "t.safetensors", "key")
    assert (again.timesteps, again.batches) == (found.timesteps, found.batches)
    assert all(torch.equal(again.columns[name], values) for name, values in found.columns.items())
    assert again.nbytes == 2 * 3 * 4 * 4


def test_other_files_are_refused(tmp_path):
    write_table(tmp_path / "t.safetensors", table((1.0,)), "key")
    with pytest.raises(ValueError, match="is the table of another model; remove it"):
        read_table(tmp_path / "t.safetensors", "other")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="is not a table of modulations"):
        read_table(tmp_path / "x.safetensors", "key")
