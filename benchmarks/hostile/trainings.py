"""A training that is killed, or started twice at once: does it end in the bits of one that was left
alone?"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl_engine.algorithms.distillation.trainer import Trainer
from ppcl_engine.data.calibration import CLEAN, CalibrationSet, save_calibration
from ppcl_engine.models.surgery import build_student
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import TensorFile

from .subjects import ARCHITECTURE, CONFIG, digest

SAME, REFUSED, CHANGED, SILENT, TRACEBACK, HANG = (
    "same",
    "refused",
    "changed",
    "silent",
    "traceback",
    "hang",
)
TRAINING = (
    "--steps",
    "12",
    "--save-every",
    "1",
    "--warm-up",
    "2",
    "--learning-rate",
    "1e-3",
    "--device",
    "cpu",
)
WAIT = 600.0  # seconds for a process of a few


@dataclass(frozen=True)
class Outcome:
    """kind: one of the six. what: the damage and the file, or the words of the command; said: the
    line, or the end of a traceback."""

    kind: str
    what: str
    said: str = ""
    seconds: float = 0.0


class Trainings:
    """A run folder that is ready for `polish`, as often as it is needed."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, 0
        self.teacher = folder / "single" / "teacher.safetensors"
        self.ready = folder / "ready"
        _prepare(self.teacher, self.ready)
        alone = self.new()
        assert self.start(alone).wait(WAIT) == 0, "a training that is left alone fails"
        self.expected = self.bits(alone)

    def new(self) -> Path:
        self.made += 1
        return Path(shutil.copytree(self.ready, self.folder / f"training_{self.made}"))

    def start(self, run: Path) -> subprocess.Popen:
        words = ["polish", "--model", str(self.teacher), "--run", str(run), *TRAINING]
        code = "import sys, torch; torch.set_num_threads(1); from ppcl_engine.__main__ import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def bits(self, run: Path) -> str:
        files = sorted((run / "polished").rglob("*.safetensors"))
        return digest(
            (f"{f.name} {n}", t) for f in files for n, t in TensorFile(f).read_all().items()
        )

    def kill(self, draw: random.Random) -> Outcome:
        run, begun = self.new(), time.perf_counter()
        process = self.start(run)
        time.sleep(draw.uniform(0, 12))
        process.kill()
        process.wait()
        again = self.start(run)
        said = again.communicate(timeout=WAIT)[1]
        return self._of(run, [again.returncode], "kill -9", said, begun)

    def pair(self, draw: random.Random) -> Outcome:
        """One after a moment, while the first may be at work or may not."""
        run, begun = self.new(), time.perf_counter()
        first = self.start(run)
        time.sleep(draw.uniform(0, 3))
        second = self.start(run)
        said = [process.communicate(timeout=WAIT)[1] for process in (first, second)]
        codes = sorted(process.returncode for process in (first, second))
        return self._of(run, codes, "two at once", "\n".join(said), begun)

    def _of(self, run: Path, codes: list[int], what: str, said: str, begun: float) -> Outcome:
        """Judges one trial: at least one process ends with 0, the run holds the expected weights, and a
        process that is refused says which one is at work."""
        seconds = time.perf_counter() - begun
        if "Traceback" in said or not set(codes) <= {0, 2} or 0 not in codes:
            return Outcome(TRACEBACK, what, said[-800:], seconds)
        if 2 in codes and "is at work on" not in said:
            return Outcome(TRACEBACK, what, said[-800:], seconds)
        return Outcome(
            SAME if self.bits(run) == self.expected else SILENT,
            f"{what} {codes}",
            said[-300:],
            seconds,
        )


def _prepare(teacher: Path, folder: Path) -> None:
    """Calibration set, plan and an untrained student."""
    run, weights = Run(folder), Weights(teacher)
    torch.manual_seed(0)
    rows = [ARCHITECTURE.random_inputs(CONFIG, 4, (1, 2, 2), 3, "cpu") for _ in range(2)]
    rows = [{**row, CLEAN: torch.randn_like(row["hidden_states"])} for row in rows]
    origin = {"architecture": ARCHITECTURE.name, "fingerprint": weights.fingerprint}
    save_calibration(run.calibration, CalibrationSet(rows, origin))
    interval = Interval(first=1, last=2)
    plan = PruningPlan(
        architecture=ARCHITECTURE.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=(interval,),
    )
    write_text(run.plan, plan.to_json())
    Trainer(build_student(ARCHITECTURE, weights.config, interval), 0.0).save(
        run.student("1-2"), "{}"
    )
