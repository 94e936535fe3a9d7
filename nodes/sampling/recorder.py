"""Hooks that record what the model is fed while one branch is sampled."""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.common_dit
import torch
from comfy.patcher_extension import WrappersMP

from ...ppcl_engine.architectures import REFERENCES, Inputs
from ...ppcl_engine.data.sampling import GUIDANCE
from ...ppcl_engine.models.weights import Weights
from ..host import host_named
from .recording import MASK, Limits, Sampling, append, recorded

KEY = "ppcl_record"
CONDITIONS = {  # diffusers' name for what a model reads of a caption -> the host's name
    "encoder_hidden_states": "c_crossattn",
    "encoder_hidden_states_mask": "attention_mask",
    "pooled_projections": "y",
}


class Recorder:
    """Wrappers around the sampling of one branch. They only take copies, so pictures stay the same to
    the bit."""

    def __init__(self, weights: Weights, path: Path, limits: Limits, tell=lambda text: None):
        self.architecture, self.path, self.limits, self.tell = (
            weights.architecture,
            path,
            limits,
            tell,
        )
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

    def _apply(
        self,
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **named,
    ):
        """Wraps the host's call of the model, where t is still sigma; further inside the host turns it
        into the architecture's timestep."""
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
        """Records one forward, whose rows are all rows of one prompt, then all of the next."""
        if latents.shape[-1] % 2 or latents.shape[-2] % 2:
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} cannot be packed into tokens of 2 x 2; "
                "draw pictures whose sides are multiples of 16"
            )
        schedule, sigma = options["sample_sigmas"], float(options["sigmas"].flatten()[0])
        step, rows = int((schedule > sigma).sum()), self.sampling.rows
        captions = self._captions(given, len(latents))
        tokens, sizes = self._references(given)
        captions |= tokens
        for number, prompt in enumerate(options["cond_or_uncond"]):
            part = slice(number * rows, (number + 1) * rows)
            own = {name: tensor[part] for name, tensor in captions.items()}
            self.sampling.see(step, prompt == 1, latents[part], t[part], own, sizes)

    def _captions(self, given: dict, rows: int) -> Inputs:
        """What the model reads of captions, by diffusers' names, one row for each row of the
        forward. The host gives no mask if no token is padding."""
        captions = {}
        for name, theirs in self.reads.items():
            tensor = given.get(theirs)
            if name == MASK:
                shape = given["c_crossattn"].shape[:2]
                tensor = torch.ones(shape, dtype=torch.bool) if tensor is None else tensor.bool()
            if tensor is None:
                raise ValueError(
                    f"the conditioning lacks what {self.architecture.name} reads as {name}; use its own text encoders"
                )
            captions[name] = tensor.expand(rows, *tensor.shape[1:])
        return captions

    def _references(self, given: dict) -> tuple[Inputs, tuple[tuple[int, ...], ...]]:
        """(tokens of all reference pictures, one after the other, sizes of the pictures in tokens)."""
        if not (pictures := given.get("ref_latents")):
            return {}, ()
        self.host.check_references(
            self.transformer, self.config, given.get("ref_latents_method"), len(pictures)
        )
        whole = [whole_tokens(flat(picture)) for picture in pictures]
        tokens = torch.cat([self.architecture.pack(picture) for picture in whole], dim=1)
        return {REFERENCES: tokens}, tuple(
            tuple(self.architecture.grid(picture)[0].tolist()) for picture in whole
        )

    def _told(self, samples: int) -> None:
        full = "; full: change seed to record others" if samples >= self.limits.samples else ""
        self.tell(f"{samples} of {self.limits.samples} samples are recorded{full}")


def flat(latents: torch.Tensor) -> torch.Tensor:
    """Latents of pictures without the dimension of frames that video models have. Raises ValueError
    for several frames."""
    if latents.ndim == 4:
        return latents
    if latents.shape[2] > 1:
        raise ValueError(
            f"latents of {latents.shape[2]} frames cannot be recorded; draw single pictures"
        )
    return latents[:, :, 0]


def whole_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Latents padded to whole tokens as the host pads them."""
    return comfy.ldm.common_dit.pad_to_patch_size(latents, (2, 2))
