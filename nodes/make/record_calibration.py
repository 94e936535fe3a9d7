"""PPCL_RecordCalibration: records what samplers feed a MODEL as the calibration set of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.models.weights import Weights
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.base_settings import Common
from ...ppcl_engine.settings.prune_settings import CalibrateConfig
from ...ppcl_engine.system.atomic import write_json
from ..host import names_in_model
from ..host.branch import layout_in, name_of
from ..host.switching import tensors_in
from ..node import Node
from ..paths import model_path, runs, teacher_files
from ..sampling.recorder import Recorder
from ..sampling.recording import Limits
from ..widgets import WHOLE_SEED, inputs, values
from .base import CATEGORY
from .runs import RECORDING, RunType
from .waiting import screen_of


def check_same_model(model, weights: Weights) -> None:
    """Raises ValueError for a MODEL that, by the names and shapes of its weights, is not the one in
    the file, and for one that runs pruned."""
    own = {name: tuple(t.shape) for name, t in tensors_in(model.model.diffusion_model).items()}
    advice = f"record with the full model of {weights.path.name}, or choose the file that the MODEL was loaded from"
    parts = {key: weights.architecture.to_comfyui(key, weights.keys()) for key in weights.keys()}
    names = names_in_model(model, [part.name for part in parts.values()])
    for key, part in parts.items():
        shape, actual = weights.shape(key), own.get(names[part.name])
        whole = part.whole(shape)
        if actual != whole:
            text = f"is {actual}, not {whole}" if actual else "is missing"
            raise ValueError(f"the MODEL's {names[part.name]} {text}; {advice}")
    if not all(place.is_teacher for place in layout_in(model).places):
        raise ValueError(f"the MODEL runs as the variant {name_of(model)!r}; {advice}")


def recording(weights: Weights, limits: Limits) -> Path:
    """The folder of the run for this model and these limits. The same ones find it again, with what
    was recorded so far."""
    asked = json.dumps({"fingerprint": weights.fingerprint, **asdict(limits)}, sort_keys=True)
    folder = runs().root / f"record-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    if not (folder / RECORDING).exists():
        write_json(folder / RECORDING, {"model": str(weights.path), **asdict(limits)})
    return folder


class RecordCalibration(Node):
    FILES = {"model_file": model_path}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_RecordCalibration",
            display_name="Record Calibration (PPCL)",
            category=CATEGORY,
            description="Passes a MODEL on; what samplers feed it is kept, and later stages learn from it.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The full model. Sample with the output in its place."
                ),
                io.Combo.Input(
                    "model_file",
                    options=teacher_files(),
                    tooltip="The file that the MODEL was loaded from: jobs read it.",
                ),
                *inputs(
                    CalibrateConfig,
                    "samples",
                    samples={
                        "min": 2,
                        "tooltip": "Most samples in all; several samplings fill them, then nothing more is recorded.",
                    },
                ),
                io.Int.Input(
                    "each_picture",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Samples kept of one picture, spread over the steps.",
                ),
                *inputs(
                    CalibrateConfig,
                    "batch empty_captions",
                    batch={"min": 1},
                    empty_captions={
                        "max": 1.0,
                        "tooltip": "Share of samples with the negative prompt, since guidance needs it too.",
                    },
                ),
                *inputs(
                    Common,
                    "seed",
                    seed={
                        **WHOLE_SEED,
                        "tooltip": "Of the choice of samples; another seed is another run.",
                    },
                ),
            ],
            outputs=[io.Model.Output(), RunType.Output(display_name="run")],
        )

    @classmethod
    def perform(cls, model, model_file, **given) -> io.NodeOutput:
        weights, limits = (
            Weights(model_path(model_file)),
            Limits(**values(CalibrateConfig, given) | {"each_picture": given["each_picture"]}),
        )
        check_same_model(model, weights)
        folder = recording(weights, limits)
        recorder = Recorder(weights, Run(folder).calibration, limits, screen_of(cls).say)
        return io.NodeOutput(recorder.around(model), folder.name)
