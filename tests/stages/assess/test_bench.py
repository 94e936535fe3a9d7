"""Bench prints a row for each variant: parameters, milliseconds, ratio to the first."""

from __future__ import annotations

import pytest

from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import parameter_count
from ppcl_engine.settings.assess_settings import BenchConfig
from ppcl_engine.stages.assess.bench import bench

TINY = {"rows": 2, "columns": 3, "text_tokens": 5, "repeats": 2, "device": "cpu"}


@pytest.fixture
def printed(capsys):
    """The rows: name -> (parameters, milliseconds, ratio)."""

    def run(path, base=None, **settings) -> dict[str, tuple[int, float, float]]:
        bench(BenchConfig(**{"path": path, "base": base, **TINY, **settings}))
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["variant", "parameters", "ms", "ratio"]
        rows = (line.split() for line in lines)
        return {
            name: (int(count.replace(",", "")), float(ms), float(ratio))
            for name, count, ms, ratio in rows
        }

    return run


def test_every_variant_of_a_bundle(printed, complete_bundle, teacher_file):
    rows = printed(complete_bundle, teacher_file)
    assert list(rows) == ["full", "small", "smallest", "smallest_tuned"]
    assert rows["full"][2] == 1
    for name, (parameters, milliseconds, ratio) in rows.items():
        model = open_model(complete_bundle, name, teacher_file)
        assert parameters == parameter_count(model), name
        assert milliseconds > 0 and ratio > 0, name


def test_a_file_of_one_model(printed, teacher_file, model):
    rows = printed(teacher_file)
    assert list(rows) == ["model"]
    assert rows["model"][0] == parameter_count(model) and rows["model"][2] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(printed, teacher_file, model, dtype):
    parameters, milliseconds, ratio = printed(teacher_file, device="cuda", dtype=dtype)["model"]
    assert parameters == parameter_count(model) and milliseconds > 0 and ratio == 1
