"""How far a job of several stages is, by the time that was estimated for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from .state import JobState, finished_stages

LEAST = 2.0  # seconds of a stage: opening files takes as long, however little there is to do


def stage_seconds(events: Sequence[dict]) -> dict[int, float]:
    """Number of each stage that the last attempt had to do -> the seconds that were estimated; empty
    before it has estimated them."""
    starts = [index for index, event in enumerate(events) if event["kind"] == "started"]
    if not starts:
        return {}
    first = finished_stages(events[: starts[-1]]) + 1
    estimated = [e.get("seconds") for e in events[starts[-1] :] if e["kind"] == "estimated"]
    return {
        number: max(LEAST, seconds)
        for number, seconds in enumerate(estimated, start=first)
        if isinstance(seconds, int | float)
    }


def share_done(state: JobState, seconds: dict[int, float]) -> float:
    """Between 0 and 1. A stage may count several things one after the other, so within it this may
    fall."""
    whole = sum(seconds.values())
    if not whole:
        return 0.0
    before = sum(time for number, time in seconds.items() if number < state.number)
    within = min(1.0, state.step / state.steps) if state.steps else 0.0
    return (before + within * seconds.get(state.number, 0.0)) / whole
