"""Presets are settings of their stages, each larger than the one before; the last is the paper's."""

import pytest

from ppcl_engine.settings.base_settings import from_mapping
from ppcl_engine.settings.presets import PRESETS, QUALITIES, preset
from ppcl_engine.stages import STAGES


@pytest.mark.parametrize("stage", PRESETS)
def test_a_preset_is_settings_of_its_stage(stage):
    rows = [preset(stage, quality) for quality in QUALITIES]
    for row in rows:
        from_mapping(STAGES[stage][0], {"model": "m", "run": "r", **row}, stage)
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    for name in rows[0].keys() - {"updates", "rounds"}:
        values = [row[name] for row in rows]
        assert values == sorted(values), name


@pytest.mark.parametrize(("stage", "steps"), [("distill-depth", 6000), ("distill-width", 2000)])
def test_the_paper_s_updates(stage, steps):
    work = [row["rounds"] * row["updates"] for row in PRESETS[stage].values()]
    assert work == sorted(work) and work[-1] == steps


def test_an_unknown_quality_is_named():
    with pytest.raises(ValueError, match="^quality 'best': choose from quick, good, paper$"):
        preset("probe", "best")
