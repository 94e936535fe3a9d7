"""The demo in the time that a test has."""

import pytest

from ppcl_engine.stages.assess import evaluate


@pytest.fixture(scope="session")
def timed_once():
    """A forward of each variant is timed once, not fifteen times for a median."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "REPEATS", 1)
        yield
