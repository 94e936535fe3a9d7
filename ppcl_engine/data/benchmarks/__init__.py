"""Public benchmarks of text-to-image models, each read from its own files by one module here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import dpg, geneval, longtext, oneig, t2i_compbench
from .items import Item


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark that `ppcl evaluate --benchmark` knows."""

    title: str
    load: Callable[[Path], list[Item]]
    files: str
    """what --prompts names"""
    grader: str
    """what judges the pictures in the authors' own code"""

    def items(self, path: Path) -> list[Item]:
        """Raises ValueError in one line for a file that is missing, empty or of another form."""
        if not path.exists():
            raise ValueError(f"{path} does not exist; give {self.files} of {self.title}")
        items = self.load(path)
        if not items:
            raise ValueError(f"{path} has no prompt; give {self.files} of {self.title}")
        if unjudged := [item.name for item in items if not item.is_judged]:
            raise ValueError(
                f"{path}: nothing is said of prompt {unjudged[0]} that its picture can be judged by"
            )
        return items


BENCHMARKS = {
    "dpg": Benchmark(
        title="DPG", load=dpg.load, files="dpg_bench.csv", grader="mPLUG-large answers"
    ),
    "geneval": Benchmark(
        title="GenEval",
        load=geneval.load,
        files="evaluation_metadata.jsonl",
        grader="Mask2Former detects, CLIP names colours",
    ),
    "longtext": Benchmark(
        title="LongText",
        load=longtext.load,
        files="text_prompts.jsonl",
        grader="Qwen2.5-VL-7B reads",
    ),
    "oneig": Benchmark(
        title="OneIG",
        load=oneig.load,
        files="OneIG-Bench.csv",
        grader="Qwen2.5-VL-7B answers and reads, LLM2CLIP compares",
    ),
    "t2i_compbench": Benchmark(
        title="T2I-CompBench",
        load=t2i_compbench.load,
        files="examples/dataset",
        grader="BLIP answers, UniDet detects, CLIP compares",
    ),
}
