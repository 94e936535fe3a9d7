"""What a listener hears of long work."""

import io

import pytest

from ppcl_engine.system import progress
from ppcl_engine.system.progress import Progress, listening


class Notes:
    def __init__(self):
        self.heard = []

    def advanced(self, what, step, steps, rate):
        self.heard.append((what, step, steps))

    def measured(self, what, step, loss):
        self.heard.append((what, step, loss))

    def saved(self):
        self.heard.append("saved")


@pytest.mark.parametrize("options", [{}, {"mininterval": 60}])
def test_every_step_is_heard(options):
    with listening(notes := Notes()):
        assert list(Progress("ab", desc="probe", total=2, **options)) == ["a", "b"]
        with Progress(total=5, initial=3, desc="distil", **options) as bar:
            bar.update()
            bar.update()
    assert notes.heard == [("probe", 1, 2), ("probe", 2, 2), ("distil", 4, 5), ("distil", 5, 5)]


def test_losses_and_saves_are_heard():
    with listening(notes := Notes()):
        progress.measured("interval 3-4", 7, 0.5)
        progress.saved()
    assert notes.heard == [("interval 3-4", 7, 0.5), "saved"]


def test_without_a_listener_nothing_happens():
    assert list(Progress("ab")) == ["a", "b"]
    progress.measured("interval 3-4", 7, 0.5)
    progress.saved()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "seconds, counts", [(0.004, [1000]), (0.2, [100 * n for n in range(1, 11)])]
)
def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch, seconds, counts):
    """However many steps there are; a bar in a terminal is drawn over itself."""
    now, log = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(total=1000, desc="probe", unit="block", file=log, mininterval=0) as bar:
        for _ in range(1000):
            now[0] += seconds
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and "" not in lines
    assert [line.split("/")[0] for line in lines] == [f"probe: {n / 10:3.0f} % {n}" for n in counts]


def test_a_bar_that_an_error_closes_ends_its_line():
    log = io.StringIO()
    bar = Progress(total=10, desc="probe", file=log)
    bar.update(3)
    Progress.close_all()
    assert log.getvalue().startswith("probe:  30 % 3/10 [") and log.getvalue().endswith("]\n")


def test_in_a_terminal_it_is_a_bar():
    with Progress(total=3, desc="probe", file=(terminal := Terminal()), mininterval=0) as bar:
        bar.update(3)
    assert terminal.getvalue().count("\r") >= 2
