"""Kernel alignment against the sums that define it, ridge regression against lstsq and closed
forms."""

import itertools

import pytest
import torch

from ppcl_engine.algorithms.detection.alignment import biased_hsic, cka, hsic, linear_gram, rbf_gram

from ...tiny.tensors import normal


def naive_hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """Means over distinct indices: K_ij L_ij - 2 K_ij L_iq + K_ij L_qr (the U-statistic itself)."""
    k, l, n = k.tolist(), l.tolist(), len(k)  # noqa: E741

    def mean(terms):
        terms = list(terms)
        return sum(terms) / len(terms)

    distinct = itertools.permutations
    pairs = mean(k[i][j] * l[i][j] for i, j in distinct(range(n), 2))
    triples = mean(k[i][j] * l[i][q] for i, j, q in distinct(range(n), 3))
    quadruples = mean(k[i][j] * l[q][r] for i, j, q, r in distinct(range(n), 4))
    return pairs - 2 * triples + quadruples


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_hsic_is_the_unbiased_estimator(gram):
    x = normal(7, 3)
    k, l = gram(x), gram(x[:, :1].square() + normal(7, 2, seed=1))  # noqa: E741
    assert float(hsic(k, l)) == pytest.approx(naive_hsic(k, l), rel=1e-10)


def test_subsets_equal_the_call_on_their_rows():
    k, l = linear_gram(normal(12, 4)), rbf_gram(normal(12, 4, seed=1))  # noqa: E741
    chosen = torch.zeros(12, 3)
    rows = [list(range(12)), [0, 2, 3, 7, 11], [1, 4, 5, 6, 8, 9]]
    for column, subset in enumerate(rows):
        chosen[subset, column] = 1
    direct = [float(hsic(k[s][:, s], l[s][:, s])) for s in rows]
    assert hsic(k, l, chosen).tolist() == pytest.approx(direct, rel=1e-10)
    direct = [float(biased_hsic(k[s][:, s], l[s][:, s])) for s in rows]
    assert biased_hsic(k, l, chosen).tolist() == pytest.approx(direct, rel=1e-10)
    direct = [float(cka(k[s][:, s], k[s][:, s] ** 2)) for s in rows]
    assert cka(k, k**2, chosen).tolist() == pytest.approx(direct, rel=1e-10)


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_alignment_ignores_rotation_scale_and_shift(gram):
    x, y = normal(40, 6), normal(40, 6, seed=1)
    y[:, :2] += x[:, :2]
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    value = float(cka(gram(x), gram(y)))
    assert 0.1 < value < 0.9
    assert float(cka(gram(x @ rotation * 37 + 5), gram(y))) == pytest.approx(value, rel=1e-8)
    assert float(cka(gram(x), gram(x @ rotation * 37 + 5))) == pytest.approx(1, abs=1e-8)


def test_independent_data_do_not_align_where_the_biased_form_says_they_do():
    x, y = normal(60, 200), normal(60, 200, seed=1)
    assert abs(float(cka(linear_gram(x), linear_gram(y)))) < 0.05
    biased = cka(linear_gram(x), linear_gram(y), estimator=biased_hsic)
    centred = [m - m.mean(0) for m in (x, y)]
    products = [
        (a.T @ b).square().sum()
        for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)
    ]
    assert (
        float(biased) == pytest.approx(float(products[0] / (products[1] * products[2]).sqrt()))
        and biased > 0.7
    )
    assert float(
        cka(linear_gram(x), linear_gram(3 * x + 1), estimator=biased_hsic)
    ) == pytest.approx(1)
