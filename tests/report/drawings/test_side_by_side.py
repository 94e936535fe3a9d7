"""The comparison of variants: sizes, words, and pictures left as they are."""

import pytest
import torch

from ppcl_engine.report.drawings.side_by_side import NARROWEST, WIDEST, Column, side_by_side

BIG = {"parameters": 20_430_000_000, "bytes": 40_860_000_000}


def column(name="full", count=1, side=64, **changes) -> Column:
    pictures = torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(count))
    return Column(name=name, pictures=pictures, **{**BIG, **changes})


def test_words():
    first, small = (
        column(seconds=2.0),
        column("small", parameters=10_600_000_000, bytes=21_200_000_000, seconds=1.0),
    )
    assert first.lines(first) == ["40.86 GB, 20.43 B parameters", "2.00 s a step"]
    assert small.lines(first) == [
        "21.20 GB, 10.6 B parameters (52 %)",
        "1.00 s a step (2.00 x as fast)",
    ]
    assert column(seconds=None).lines(first)[1] == "seconds a step: not known"


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_size_and_range(columns):
    sheet = side_by_side([column(str(i), count=i + 1) for i in range(columns)])
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    assert sheet.shape[2] > columns * NARROWEST and 0 <= sheet.min() < sheet.max() <= 1


def test_pictures_of_the_right_width_are_pasted_as_they_are():
    one = column(side=512)
    sheet, margin = side_by_side([one, column(side=512)]), 512 // 17
    stored = (one.pictures[0] * 255).round() / 255
    assert torch.allclose(sheet[0, margin : margin + 512, margin : margin + 512], stored, atol=1e-6)


def test_large_pictures_of_many_columns_get_smaller():
    sheet = side_by_side([column(side=1328) for _ in range(3)])
    assert sheet.shape[2] < 3 * (WIDEST + 100) + 100
    assert side_by_side([column(side=1328)]).shape[2] > 1328


def test_long_names_are_cut():
    assert side_by_side([column("x" * 500)]).shape[2] < NARROWEST + 100
