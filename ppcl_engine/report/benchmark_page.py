"""The page of the public benchmarks that a run was judged on."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from ..system.atomic import write_text
from .benchmark_sections import benchmark_sections, read_benchmarks
from .html import document


def write_benchmark_page(run: Run) -> Path:
    """Writes the page of all benchmarks that a run was judged on, and returns its path."""
    results = read_benchmarks(run)
    write_text(run.benchmark_page, document("PPCL benchmarks", *benchmark_sections(run, results)))
    return run.benchmark_page
