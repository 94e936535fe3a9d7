"""PPCL_RecordCalibration: a MODEL that keeps what samplers feed it, as the calibration set of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import comfy.ldm.common_dit
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.v0_0_2 import io

from ..ppcl_engine.architectures import REFERENCES, Inputs
from ..ppcl_engine.checkpoint import Weights
from ..ppcl_engine.config import CalibrateConfig, Common
from ..ppcl_engine.files import write_json
from ..ppcl_engine.run import Run
from ..ppcl_engine.sampling import GUIDANCE
from .branch import layout_in, name_of
from .host import host_named, names_in_model
from .host.parts import tensors_in
from .job import CATEGORY
from .node import Node
from .paths import model_path, runs, teacher_files
from .recording import MASK, Limits, Sampling, append, recorded
from .runs import RECORDING, RunType
from .settings import WHOLE_SEED, inputs, values
from .waiting import screen_of

KEY = "ppcl_record"
CONDITIONS = {  # what a model reads of captions, by diffusers' names -> by the host's
    "encoder_hidden_states": "c_crossattn",
    "encoder_hidden_states_mask": "attention_mask",
    "pooled_projections": "y",
}


class Recorder:
    """Wrappers around one branch's sampling. Only copies are taken: the pictures stay as they are, to the bit."""

    def __init__(self, weights: Weights, path: Path, limits: Limits, tell=lambda text: None):
        self.architecture, self.path, self.limits, self.tell = weights.architecture, path, limits, tell
        self.config, self.host = weights.config, host_named(weights.architecture.name)
        self.reads = {name: CONDITIONS[name] for name in weights.architecture.caption_inputs}
        if weights.architecture.takes_guidance(weights.config):
            self.reads[GUIDANCE] = GUIDANCE
        self.origin = {
            "architecture": weights.architecture.name,
            "fingerprint": weights.fingerprint,
            "seed": limits.seed,
            "source": "recorded",
        }
        self.sampling: Sampling | None = None

    def around(self, model):
        """A clone of the host's patcher that is recorded."""
        new, self.transformer = model.clone(), model.model.diffusion_model
        new.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._sample)
        new.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply)
        return new

    def _sample(self, executor, guider, sigmas, extra_args, callback, noise, *arguments, **named):
        known = recorded(self.path, self.origin)
        left = self.limits.samples - known.samples
        if left <= 0 or len(sigmas) < 2:
            self._told(known.samples)
            return executor(guider, sigmas, extra_args, callback, noise, *arguments, **named)
        self.sampling = Sampling(self.limits, len(known), len(noise), len(sigmas) - 1)
        try:
            samples = executor(guider, sigmas, extra_args, callback, noise, *arguments, **named)
            sampling = self.sampling
        finally:
            self.sampling = None
        if float(sigmas[-1]) == 0:
            batches = sampling.batches(self.architecture, flat(samples), left)
            self._told(append(self.path, self.origin, batches).samples)
        else:
            self.tell("not recorded: this sampling stops before its pictures are clean")
        return samples

    def _apply(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **named):
        """Before the host turns sigma, which is our t, into what the architecture calls a timestep."""
        options = transformer_options or {}
        if self.sampling is not None:
            if c_concat is not None:
                raise ValueError(
                    "Record Calibration (PPCL) cannot store what a fill or inpainting model reads beside its latents; "
                    "sample without it"
                )
            self._see(flat(x), t, {**named, "c_crossattn": c_crossattn}, options)
        return executor(x, t, c_concat, c_crossattn, control, options, **named)

    def _see(self, latents: torch.Tensor, t: torch.Tensor, given: dict, options: dict) -> None:
        """Rows of a forward: all rows of one prompt, then all of the next."""
        if latents.shape[-1] % 2 or latents.shape[-2] % 2:
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} are no whole tokens; "
                "draw pictures whose sides are multiples of 16"
            )
        schedule, sigma = options["sample_sigmas"], float(options["sigmas"].flatten()[0])
        step, rows = int((schedule > sigma).sum()), self.sampling.rows
        captions = self._captions(given, len(latents))
        tokens, sizes = self._references(given)
        captions |= tokens
        for place, prompt in enumerate(options["cond_or_uncond"]):
            part = slice(place * rows, (place + 1) * rows)
            own = {name: tensor[part] for name, tensor in captions.items()}
            self.sampling.see(step, prompt == 1, latents[part], t[part], own, sizes)

    def _captions(self, given: dict, rows: int) -> Inputs:
        """By diffusers' names, a row each. The host gives no mask where all tokens are real."""
        found = {}
        for name, theirs in self.reads.items():
            tensor = given.get(theirs)
            if name == MASK:
                shape = given["c_crossattn"].shape[:2]
                tensor = torch.ones(shape, dtype=torch.bool) if tensor is None else tensor.bool()
            if tensor is None:
                raise ValueError(
                    f"the conditioning lacks what {self.architecture.name} reads as {name}; use its own encoders"
                )
            found[name] = tensor.expand(rows, *tensor.shape[1:])
        return found

    def _references(self, given: dict) -> tuple[Inputs, tuple[tuple[int, ...], ...]]:
        """Tokens of all reference pictures behind each other, a row each, and the pictures' sizes in tokens."""
        if not (pictures := given.get("ref_latents")):
            return {}, ()
        self.host.check_references(self.transformer, self.config, given.get("ref_latents_method"), len(pictures))
        whole = [whole_tokens(flat(picture)) for picture in pictures]
        tokens = torch.cat([self.architecture.pack(picture) for picture in whole], dim=1)
        return {REFERENCES: tokens}, tuple(tuple(self.architecture.grid(picture)[0].tolist()) for picture in whole)

    def _told(self, samples: int) -> None:
        full = "; full: change seed to record others" if samples >= self.limits.samples else ""
        self.tell(f"{samples} of {self.limits.samples} samples are recorded{full}")


def flat(latents: torch.Tensor) -> torch.Tensor:
    """Latents of pictures, without the frame that video models have. Raises ValueError for several frames."""
    if latents.ndim == 4:
        return latents
    if latents.shape[2] > 1:
        raise ValueError(f"latents of {latents.shape[2]} frames cannot be recorded; draw single pictures")
    return latents[:, :, 0]


def whole_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Filled up as the host does it."""
    return comfy.ldm.common_dit.pad_to_patch_size(latents, (2, 2))


def check_same_model(model, weights: Weights) -> None:
    """Raises ValueError where a MODEL has other weights than its file, by names and shapes, or runs pruned."""
    own = {name: tuple(t.shape) for name, t in tensors_in(model.model.diffusion_model).items()}
    advice = f"record with the full model of {weights.path.name}, or choose the file that the MODEL was loaded from"
    parts = {key: weights.architecture.to_comfyui(key, weights.keys()) for key in weights.keys()}
    names = names_in_model(model, [part.name for part in parts.values()])
    for key, part in parts.items():
        shape, found = weights.shape(key), own.get(names[part.name])
        whole = (shape[0] // len(part.pieces) * part.of, *shape[1:]) if part.of > 1 else shape
        if found != whole:
            text = f"is {found}, not {whole}" if found else "is not there"
            raise ValueError(f"the MODEL's {names[part.name]} {text}; {advice}")
    if not all(place.is_teacher for place in layout_in(model).places):
        raise ValueError(f"the MODEL runs as the variant {name_of(model)!r}; {advice}")


def recording(weights: Weights, limits: Limits) -> Path:
    """The folder of the run for a model and limits: the same ones find it again, with what is in it."""
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
                io.Model.Input("model", tooltip="The full model. Sample with the output in its place."),
                io.Combo.Input(
                    "model_file", options=teacher_files(), tooltip="The file that the MODEL was loaded from: jobs read it."
                ),
                *inputs(CalibrateConfig, "samples", samples={
                    "min": 2, "tooltip": "Most samples in all; several samplings fill them, then nothing more is recorded."
                }),
                io.Int.Input(
                    "each_picture", default=8, min=1, max=1000,
                    tooltip="Samples kept of one picture, spread over the steps.",
                ),
                *inputs(CalibrateConfig, "batch empty_captions", batch={"min": 1}, empty_captions={
                    "max": 1.0, "tooltip": "Share of samples with the negative prompt, since guidance needs it too."
                }),
                *inputs(Common, "seed", seed={**WHOLE_SEED, "tooltip": "Of the choice of samples; another seed is another run."}),
            ],
            outputs=[io.Model.Output(), RunType.Output(display_name="run")],
        )  # fmt: skip

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
