"""A tiny random teacher, a calibration set with padded text, and the stages run on them."""

from __future__ import annotations

import gc
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.architectures import REFERENCES, architecture_named
from ppcl_engine.data.calibration import CLEAN, CalibrationSet, save_calibration
from ppcl_engine.data.flow import noised
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings import prune_settings
from ppcl_engine.stages import function_of
from ppcl_engine.system.tensor_files import write_tensors
from ppcl_engine.system.user_cache import FOLDER

from .tiny.models import tiny_grid, tiny_model

torch.set_num_threads(1)

CONFIGS = {
    "probe": (prune_settings.ProbeConfig, {"train_steps": 0}),
    "detect": (
        prune_settings.DetectConfig,
        {"remove": 2, "longest": 4, "bootstrap": 8, "tokens": 3},
    ),
    "distill_depth": (
        prune_settings.DistillDepthConfig,
        {"rounds": 2, "updates": 6, "warm_up": 2, "learning_rate": 1e-3},
    ),
    "variants": (prune_settings.VariantsConfig, {"samples": 12}),
}


def pytest_collection_finish() -> None:
    """A collection of garbage no longer walks all that imports have left, which takes 0.3 s, as
    every measurement of memory would."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """What a test writes does not have to outlast a power cut."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """The user's own keeps no figures of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def architecture(request):
    """Qwen-Image, or what a test module names by parametrizing this fixture: all others follow."""
    return architecture_named(getattr(request, "param", "qwen_image"))


@pytest.fixture(scope="session")
def make_model(architecture):
    """diffusers' own class at the tiny size, with weights so large that every block matters."""
    return partial(tiny_model, architecture)


@pytest.fixture(scope="session")
def model_config(architecture):
    """The configuration of a model, as our files carry it."""
    return lambda model: {
        k: v for k, v in model.config.items() if k in architecture.tiny_config or k == "zero_cond_t"
    }


@pytest.fixture(scope="session")
def save_model(model_config):
    def save(path: Path, model: torch.nn.Module) -> Path:
        write_tensors(path, model.state_dict(), {"config": json.dumps(model_config(model))})
        return path

    return save


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory, model, save_model) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", model)


@pytest.fixture(scope="session")
def padded_inputs(architecture):
    """Inputs of the tiny model whose captions have different lengths where it masks them; padding
    holds noise, not zeros. references: the sizes of an edit model's."""

    def make(
        seed: int = 0, samples: int = 6, grid=None, text_tokens: int = 5, references=()
    ) -> dict:
        grid = grid or tiny_grid(architecture)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inputs = architecture.random_inputs(
                architecture.tiny_config, samples, grid, text_tokens, "cpu"
            )
            lengths = torch.randint(2, text_tokens + 1, (samples, 1))
            if references:
                inputs["grid"] = torch.tensor([grid, *references])
                tokens = int(inputs["grid"][1:].prod(1).sum())
                inputs[REFERENCES] = torch.randn(samples, tokens, inputs["hidden_states"].shape[-1])
        lengths[0] = text_tokens - 2
        if "encoder_hidden_states_mask" not in inputs:
            return inputs
        return {**inputs, "encoder_hidden_states_mask": torch.arange(text_tokens) < lengths}

    return make


@pytest.fixture(scope="session")
def calibration_of(architecture, padded_inputs):
    """A calibration set for a teacher file, with the clean picture of every sample."""

    def make(teacher: Path, batches: int = 4, **options) -> CalibrationSet:
        rows = []
        for seed in range(batches):
            inputs = padded_inputs(seed=seed, **options)
            clean = torch.randn(
                inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(100 + seed)
            )
            inputs["hidden_states"] = noised(clean, inputs["hidden_states"], inputs["timestep"])
            rows.append({**inputs, CLEAN: clean})
        origin = {"architecture": architecture.name, "fingerprint": Weights(teacher).fingerprint}
        return CalibrationSet(rows, origin)

    return make


@pytest.fixture(scope="session")
def make_run(calibration_of):
    """A run folder that holds a calibration set."""

    def make(folder: Path, teacher: Path, calibration: CalibrationSet | None = None) -> Path:
        save_calibration(Run(folder).calibration, calibration or calibration_of(teacher))
        return folder

    return make


@pytest.fixture(scope="session")
def run_stages():
    """Runs stages by name at tiny settings; `settings` go to every stage that knows them."""

    def run(teacher: Path, folder: Path, *names: str, **settings) -> Run:
        for name in names:
            kind, tiny = CONFIGS[name]
            chosen = {k: v for k, v in settings.items() if k in kind.__dataclass_fields__}
            stage = function_of(name.replace("_", "-"))
            stage(kind(**{"model": teacher, "run": folder, "device": "cpu", **tiny, **chosen}))
        return Run(folder)

    return run


@pytest.fixture
def line_of(capsys):
    """Runs a command that must fail at once; returns the one line that it says."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == USER_ERROR
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def error_of(capsys):
    """Runs a command that must fail, after whatever progress it shows; returns its one line of
    error."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == USER_ERROR
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ppcl:")]
        assert len(lines) == 1
        return lines[0]

    return run
