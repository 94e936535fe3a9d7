"""Ctrl-C during training: the caller is asked to stop, and no interrupt is lost."""

from __future__ import annotations

import os
import signal

import pytest

from ppcl_engine.system.interruption import Stopped, stop_on_interrupt


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def as_in_any_program():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_in_the_last_step_no_further_stage_begins():
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as asked:
        assert not asked()
        interrupt()
        assert asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_caller_that_stops_says_so_itself():
    with pytest.raises(Stopped), stop_on_interrupt() as asked:
        interrupt()
        if asked():
            raise Stopped("saved")


def test_the_second_one_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt():
        interrupt()
        interrupt()
        raise AssertionError("it went on")
