"""What a listener hears of long work."""

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
