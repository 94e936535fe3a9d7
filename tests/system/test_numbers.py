"""Numbers as people read them."""

import pytest

from ppcl_engine.system.numbers import (
    bytes_text,
    count_text,
    duration_text,
    seconds_text,
    speed_text,
)


@pytest.mark.parametrize(
    "count, text",
    [
        (20_430_401_088, "20.43 B"),
        (10_600_000_000, "10.6 B"),
        (58_300_000, "58.3 M"),
        (8.11e6, "8.11 M"),
        (512_000, "512 k"),
        (999, "999"),
    ],
)
def test_counts_have_four_digits(count, text):
    assert count_text(count) == text


def test_bytes():
    assert (bytes_text(23.86e9), bytes_text(16.2e6)) == ("23.86 GB", "16.2 MB")


def test_the_time_of_a_step():
    assert (seconds_text(1.25), seconds_text(0.0083)) == ("1.25 s", "8.3 ms")
    assert (speed_text(2.5), speed_text(0.025)) == ("2.5/s", "40 s each")


def test_the_time_of_a_run():
    assert [duration_text(s) for s in (40, 360, 12_000)] == ["40 s", "6 min", "3 h 20 min"]
