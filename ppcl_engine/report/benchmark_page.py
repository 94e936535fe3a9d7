"""The page of the public benchmarks that a run was judged on."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from ..system.atomic import read_object, write_text
from .benchmark_sections import benchmark_sections, read_benchmarks
from .html import document
from .run_report import write_report


def write_benchmark_page(run: Run) -> Path:
    """Writes the page of all benchmarks that a run was judged on, and its report anew where it has one.
    Returns the page's path."""
    results = read_benchmarks(run)
    write_text(run.benchmark_page, document("PPCL benchmarks", *benchmark_sections(run, results)))
    if run.report.exists() and run.evaluation.exists():
        write_report(run.folder, read_object(run.folder / "report.json").get("seconds"))
    return run.benchmark_page
