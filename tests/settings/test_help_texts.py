"""The words under a setting."""

import pytest

from ppcl_engine.settings.convert_settings import ImportConfig
from ppcl_engine.settings.help_texts import setting_help
from ppcl_engine.settings.prune_settings import DetectConfig


def test_one_line_whatever_the_source_has():
    assert setting_help(ImportConfig, "run") == "The folder that the file is written to."
    assert "\n" not in setting_help(DetectConfig, "method") and setting_help(
        DetectConfig, "method"
    ).endswith("end damage.")


def test_unknown_settings_name_the_known():
    with pytest.raises(
        ValueError, match="ImportConfig has no help text for 'speed'; it documents: path, base, run"
    ):
        setting_help(ImportConfig, "speed")
