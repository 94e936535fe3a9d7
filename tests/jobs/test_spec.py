"""run.json: there and back, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcl_engine.jobs.spec import ALLOWED, SPEC_FILE, JobSpec, configs, read_spec, write_spec
from ppcl_engine.settings.prune_settings import CalibrateConfig, DistillDepthConfig
from ppcl_engine.stages import STAGES

SPECS = st.builds(
    JobSpec,
    stages=st.lists(
        st.tuples(
            st.sampled_from(ALLOWED),
            st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()),
        )
    ).map(tuple),
    parallel=st.sampled_from(["data", "intervals"]),
    outlive=st.booleans(),
    preview_seconds=st.floats(0, 3600),
    upstream=st.text("abc-1", max_size=9),
    identity=st.text("abc1", max_size=9),
)


@given(SPECS)
def test_there_and_back(tmp_path_factory, spec):
    folder = tmp_path_factory.getbasetemp()
    write_spec(folder, spec)
    assert read_spec(folder) == spec


def test_paths_are_written_as_text(tmp_path):
    write_spec(tmp_path, JobSpec(stages=(("probe", {"model": Path("/m")}),)))
    assert read_spec(tmp_path).stages == (("probe", {"model": str(Path("/m"))}),)


def test_a_job_does_the_stages_of_the_command_line():
    assert set(ALLOWED) < set(STAGES)
    assert not {"generate", "inspect", "bench", "demo", "import"} & set(ALLOWED)


def test_settings_become_configs_in_the_folder(tmp_path):
    spec = JobSpec(
        stages=(
            ("calibrate", {"model": "m.safetensors", "images": "pictures"}),
            ("distill-depth", {"model": "/m"}),
        )
    )
    (first, calibrate), (second, distill) = configs(spec, tmp_path)
    assert (first, second) == ("calibrate", "distill-depth")
    assert calibrate == CalibrateConfig(
        model=tmp_path / "m.safetensors", run=tmp_path, images=tmp_path / "pictures"
    )
    assert distill == DistillDepthConfig(model=Path("/m"), run=tmp_path)


def test_another_machine_has_the_model_elsewhere(tmp_path):
    spec = JobSpec(stages=(("probe", {"model": "/there/m"}), ("export", {"model": "/there/m"})))
    assert {config.model for _, config in configs(spec, tmp_path, Path("/here/m"))} == {
        Path("/here/m")
    }


def test_a_model_that_is_made_sparse_is_elsewhere_too(tmp_path):
    whole, variant = {"path": "/there/m"}, {"path": "/there/bundle", "base": "/there/m"}
    spec = JobSpec(stages=(("sparsify", whole), ("sparsify", variant)))
    (_, first), (_, second) = configs(spec, tmp_path, Path("/here/m"))
    assert (first.path, first.base) == (Path("/here/m"), None)
    assert (second.path, second.base) == (Path("/there/bundle"), Path("/here/m"))


@pytest.mark.parametrize(
    "stage, settings, line",
    [
        ("demo", {}, "unknown stage 'demo'; a job can do: calibrate, probe"),
        ("generate", {"path": "/m"}, "unknown stage 'generate'"),
        ("../probe", {}, "unknown stage '../probe'"),
        (
            "probe",
            {"model": "/m", "ridgee": 1.0},
            "stage probe: unknown setting 'ridgee'; did you mean 'ridge'? known: ",
        ),
        ("probe", {"ridge": 1.0}, "stage probe: setting 'model' is missing"),
        ("probe", {"model": "/m", "ridge": "1"}, "stage probe: ridge = '1' is not float"),
        ("probe", {"model": "/m", "run": "/etc"}, "stage probe: a job sets 'run' itself"),
        (
            "probe",
            {"model": "/m", "dry_run": True},
            "stage probe: a job sets 'dry_run' itself",
        ),
        (
            "detect",
            {"model": "/m", "method": "guess"},
            "stage detect: method = 'guess'; choose from ppcl, budget",
        ),
        (
            "polish",
            {"model": "/m", "steps": 0},
            "stage polish: steps = 0; choose a whole number from 1 to 1,000,000",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, stage, settings, line):
    with pytest.raises(ValueError) as caught:
        configs(JobSpec(stages=((stage, settings),)), tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


GOOD = {"version": 1, "stages": [["probe", {"model": "/m"}]]}
RUBBISH = {
    "no JSON": "{",
    "a list": "[]",
    "no version": {"stages": []},
    "another version": {**GOOD, "version": 99},
    "no stages": {"version": 1},
    "stages that are a word": {**GOOD, "stages": "probe"},
    "a stage alone": {**GOOD, "stages": ["probe"]},
    "settings that are a list": {**GOOD, "stages": [["probe", []]]},
    "a stage that is none": {**GOOD, "stages": [["shell", {}]]},
    "an unknown field": {**GOOD, "command": "rm"},
    "a mode that is none": {**GOOD, "parallel": "threads"},
    "seconds that are a word": {**GOOD, "preview_seconds": "often"},
}


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
def test_rubbish_is_refused_in_one_line(tmp_path, content):
    (tmp_path / SPEC_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read_spec(tmp_path)
    assert str(tmp_path / SPEC_FILE) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_spec_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a job folder"):
        read_spec(tmp_path)
