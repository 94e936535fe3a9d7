"""Run folders that the training stages begin from."""

from __future__ import annotations

import pytest

from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text

from ...tiny.distilled_depth import ALL


@pytest.fixture(scope="session")
def depth_trained(tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """A run with students for 2-3 and 4-5."""
    run = run_stages(
        teacher_file, make_run(tmp_path_factory.mktemp("width"), teacher_file), "probe", "detect"
    )
    plan = run.load_plan().with_parts(intervals=parse_intervals("2-3 4-5"))
    write_text(run.plan, plan.to_json())
    return run_stages(teacher_file, run.folder, "distill_depth")


@pytest.fixture
def width_run(depth_trained, tmp_path):
    """Copies of a run with students for 2-3 and 4-5, without projections."""

    def make(name: str = "run") -> Run:
        run = Run(tmp_path / name)
        run.folder.mkdir()
        for path in (depth_trained.calibration, depth_trained.students):
            (run.folder / path.name).symlink_to(path)
        run.plan.write_text(depth_trained.plan.read_text())
        return run

    return make


@pytest.fixture
def depth_run(tmp_path, architecture, teacher_file, make_run):
    """Run folders with a calibration and a plan, no detection needed."""

    def make(
        name: str = "run", intervals: str = " ".join(ALL), calibration: CalibrationSet | None = None
    ):
        run, weights = (
            Run(make_run(tmp_path / name, teacher_file, calibration)),
            Weights(teacher_file),
        )
        plan = PruningPlan(
            architecture=architecture.name,
            config=weights.config,
            num_blocks=6,
            fingerprint=weights.fingerprint,
            intervals=parse_intervals(intervals),
        )
        run.plan.write_text(plan.to_json())
        return run

    return make


@pytest.fixture
def distill(teacher_file, run_stages):
    return lambda run, **settings: run_stages(teacher_file, run.folder, "distill_depth", **settings)
