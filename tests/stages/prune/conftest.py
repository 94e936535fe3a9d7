"""Run folders that the training stages begin from."""

from __future__ import annotations

import pytest

from ppcl_engine.data.calibration import CLEAN, CalibrationSet
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text

from ...tiny.distilled_depth import ALL
from ...tiny.trained_run import write_parts


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


@pytest.fixture
def parts_run(tmp_path, teacher_file, make_run, calibration_of):
    """Run folders with parts of every kind that nobody trained. clean: whether the calibration set
    has the clean pictures, which noise is drawn onto anew."""

    def make(name: str = "run", samples: int = 6, width: bool = True, clean: bool = True) -> Run:
        calibration = calibration_of(teacher_file, samples=samples)
        if not clean:
            calibration.batches = [
                {n: t for n, t in row.items() if n != CLEAN} for row in calibration.batches
            ]
        run = Run(make_run(tmp_path / name, teacher_file, calibration))
        write_parts(run, teacher_file, width)
        return run

    return make
