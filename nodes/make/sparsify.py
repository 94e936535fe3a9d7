"""PPCL_Sparsify: a job that sets weights of a model to zero without training, chosen by what its layers
read in a run's calibration."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.algorithms.sparsity.patterns import checked_sparsity, pattern_named
from ...ppcl_engine.algorithms.sparsity.source import open_source
from ...ppcl_engine.data.calibration import load_calibration
from ...ppcl_engine.models.bundle import BUNDLE_SUFFIX, is_bundle
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.convert_settings import SparsifyConfig
from ...ppcl_engine.system.numbers import bytes_text
from ..paths import EXPORTS, exported_name, files_of_the_engine, model_path
from ..widgets import check_file_name, help_of, inputs
from . import results
from .base import FileType, JobNode
from .runs import folder_of, run_input
from .waiting import in_words_of_widgets

OWN = "the run's own"
SETTINGS = "pattern sparsity score granularity exchange compensate permute skip name store"


def named_file(name: str) -> Path | None:
    """Path of the file, None for the run's own. Raises ValueError for a name that is not in the
    list."""
    return None if name == OWN else model_path(name)


class Sparsify(JobNode):
    FIRST = ("file", "variant", "pattern", "sparsity", "name")
    PICTURES = ("layer errors",)
    FILES = {**JobNode.FILES, "file": named_file}

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = files_of_the_engine()
        return cls.schema(
            "Sparsify",
            "Sparsify",
            "Sets weights to zero with no training, a block at a time, by what the layers read in a calibration.",
            [
                run_input(
                    tooltip="A calibration, recorded or from prompts, or any run behind one."
                ),
                io.Combo.Input(
                    "file",
                    options=[OWN, *files],
                    default=OWN,
                    tooltip=f"What to prune. {OWN}: the bundle that the run exported, else its full model. Of a bundle the base "
                    "is the run's full model.",
                ),
                io.String.Input("variant", default="", tooltip=help_of(SparsifyConfig, "variant")),
                *inputs(SparsifyConfig, SETTINGS, sparsity={"default": 0.5, "max": 1.0}),
            ],
            more=(
                FileType.Output(
                    display_name="file", tooltip="For file of Load Pruned Model (PPCL)."
                ),
            ),
            seed=False,
            previews=True,
            kind=SparsifyConfig,
        )

    @classmethod
    def perform(cls, run, file, variant, **given) -> io.NodeOutput:
        check_file_name(given["name"])
        checked_sparsity(given["sparsity"], pattern_named(given["pattern"]))
        model = cls.ready(run, given)
        path = named_file(file) or bundle_of(run) or model
        base, chosen = model if is_bundle(path) else None, variant.strip() or None
        check(run, path, base, chosen)
        settings = {**given, "path": str(path), "base": base and str(base), "variant": chosen}
        return cls.output(
            cls.work("sparse", [(SparsifyConfig, "sparsify", settings)], run, given, model), _pruned
        )

    @classmethod
    def nothing(cls) -> list:
        return [""]


def check(run: str, path: Path, base: Path | None, variant: str | None) -> None:
    """Checks, before a process is started, what that would find out: only kilobytes of the file are
    read. Raises ValueError, with the widgets' names, for a file or variant that cannot be pruned and
    for a calibration of another model."""
    try:
        source = open_source(path, base, variant)
        load_calibration(Run(folder_of(run)).calibration).check_model(
            source.architecture.name, source.fingerprint, run
        )
    except ValueError as error:
        raise ValueError(in_words_of_widgets(str(error))) from None


def bundle_of(run: str) -> Path | None:
    """The bundle that the run exported, if any."""
    return next(iter(sorted((folder_of(run) / EXPORTS).glob(f"*{BUNDLE_SUFFIX}"))), None)


def _pruned(folder: Path) -> list:
    report = results.sparse_report(folder)
    (file,) = (folder / EXPORTS).glob("*.safetensors")
    text = (
        f"{exported_name(file)}: {bytes_text(file.stat().st_size)}\n{results.sparse_text(report)}"
    )
    return [results.sparse_picture(report), text, exported_name(file)]
