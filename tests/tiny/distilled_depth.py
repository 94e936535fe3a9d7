"""What a distillation of depth on the tiny teacher left."""

from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile

ALL = ("0-1", "2-4")


def losses(run: Run, interval: str) -> list[float]:
    return TensorFile(run.student(interval)).read("losses").tolist()


def students(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.students.iterdir())}
