"""The mathematics of folding: the basis is orthonormal and holds the mean, errors are what a
projection leaves, a change of low rank is projected exactly, marks tell models apart."""

import pytest
import torch
import torch.nn.functional as F

from ppcl_engine.models.folding.basis import (
    RANKS,
    Curve,
    directions,
    errors_by_rank,
    mark_of,
    project,
    useful_ranks,
    values_at,
)


@pytest.fixture
def inputs():
    """A curve of 200 points in 24 dimensions, smooth, far from zero."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 200)[:, None]
    waves = torch.cat([torch.cos(t * f) for f in (1, 2, 3, 5, 8, 13)], dim=1)
    return F.silu(
        waves @ torch.randn(6, 24, generator=generator) + torch.randn(24, generator=generator)
    )


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, 24, generator=generator), torch.randn(30, generator=generator)


def test_directions_are_the_mean_and_the_leading_ones(inputs):
    basis = directions(inputs, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    mean = inputs.double().mean(dim=0)
    torch.testing.assert_close(basis[:, 0], mean / mean.norm())
    rest = inputs.double() - inputs.double() @ basis[:, :1] @ basis[:, :1].T
    best = torch.linalg.svdvals(rest)[5:].square().sum()
    torch.testing.assert_close(
        (inputs.double() - inputs.double() @ basis @ basis.T).square().sum(), best
    )


@pytest.mark.parametrize("rank", [1, 4, 23])
def test_errors_are_those_of_the_projected_map(inputs, linear, rank):
    weight, bias = linear
    basis = directions(inputs, 23)
    found = errors_by_rank(weight, bias, inputs, basis, (rank,))[0]
    here = basis[:, : rank + 1].float()
    exact, folded = (
        F.linear(inputs, weight, bias),
        F.linear(inputs @ here, project(weight, here), bias),
    )
    torch.testing.assert_close(
        found, (folded - exact).norm(dim=1) / exact.norm(dim=1), rtol=1e-3, atol=1e-5
    )


def test_more_directions_never_hurt_in_all(inputs, linear):
    errors = errors_by_rank(*linear, inputs, directions(inputs, 23), (1, 2, 4, 8, 16, 23))
    power = errors.square().sum(dim=1)
    assert (power[1:] <= power[:-1] + 1e-9).all() and errors[-1].max() < 1e-5 < errors[0].max()


def test_a_change_of_low_rank_is_projected_exactly(inputs, linear):
    """(W + B A) P = W P + B (A P)"""
    weight, basis = linear[0], directions(inputs, 5)
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(30, 3, generator=generator), torch.randn(3, 24, generator=generator)
    torch.testing.assert_close(
        project(weight + up @ down, basis), project(weight, basis) + up @ project(down, basis)
    )


def test_a_wide_map_is_folded_in_parts(inputs, monkeypatch, linear):
    basis = directions(inputs, 5)
    whole = project(linear[0], basis), errors_by_rank(*linear, inputs, basis, (2, 5))
    monkeypatch.setattr("ppcl_engine.models.folding.basis.ROWS_AT_ONCE", 7)
    torch.testing.assert_close(project(linear[0], basis), whole[0])
    torch.testing.assert_close(errors_by_rank(*linear, inputs, basis, (2, 5)), whole[1])


def test_useful_ranks_save_half_of_the_weights():
    assert useful_ranks(96) == (1, 2, 4, 8, 12, 16, 24, 32)
    assert useful_ranks(3072) == RANKS and useful_ranks(3) == ()


def test_the_smallest_rank_within_the_bound():
    curve = Curve((1, 2, 4))
    curve.add("a", torch.tensor([[0.5, 0.1], [0.1, 0.0], [0.01, 0.0]]))
    curve.add("b", torch.tensor([[0.2, 0.2], [0.05, 0.2], [0.0, 0.02]]))
    assert curve.worst.tolist() == pytest.approx([0.5, 0.2, 0.02]) and curve.mean.tolist()[
        0
    ] == pytest.approx(0.25)
    assert [curve.smallest_rank(bound) for bound in (0.6, 0.3, 0.02 + 1e-6)] == [1, 2, 4]
    assert curve.worst_part(1) == "a" and curve.worst_part(4) == "b"
    with pytest.raises(
        ValueError, match=r"within 0.01: rank 4 leaves 0.02 at worst \(in b\); fold with form table"
    ):
        curve.smallest_rank(0.01)
    assert [row["rank"] for row in curve.to_json()["curve"]] == [1, 2, 4]


def test_values_are_the_modulations_own():
    modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(8, 12))
    given = {rows: torch.randn(5, 1, 8).expand(5, rows, 8) for rows in (1, 3)}
    found = values_at(modulation, given)
    assert found.shape == (12, 10)
    for place, rows in enumerate((1, 3)):
        for t in range(5):
            with torch.no_grad():
                assert torch.equal(found[:, 5 * place + t], modulation(given[rows][t])[0])


def test_marks_tell_a_changed_model():
    tensors = {
        "a.weight": torch.randn(9, 4),
        "b.weight": torch.randn(9, 4),
        "b.bias": torch.randn(9),
    }

    def mark(**changed: torch.Tensor) -> str:
        now = {**tensors, **changed}
        return mark_of(now, lambda name, rows: now[name][:rows])

    merged = tensors["b.weight"] + 1e-3 * torch.randn(9, 1) @ torch.randn(1, 4)  # a LoRA
    last = tensors["b.bias"] + torch.eye(9)[8]
    assert (
        mark() == mark()
        and len({mark(), mark(**{"b.weight": merged}), mark(**{"b.bias": last})}) == 3
    )
