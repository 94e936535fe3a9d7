"""Finds out, before a sampler starts, for which timesteps it will ask the model."""

from __future__ import annotations

from types import SimpleNamespace

import torch

HOSTS_OWN = "comfy."


def timesteps_of(patcher, sampler, sigmas: torch.Tensor) -> list[float]:
    """The timesteps as the model is given them, in float32, each once. 0 is always among them: edit
    models read it for their references.

    Some samplers evaluate the model between the sigmas of their schedule. Where they do so depends on
    the schedule alone, so the host's own samplers are run on a model that does nothing. The timesteps
    of samplers that decide on their way (dpm_adaptive) cannot be known.
    """
    sampling = patcher.get_model_object("model_sampling")
    sigmas = sigmas.to(patcher.load_device, torch.float32)
    wanted = torch.cat([sigmas, *between(patcher, sampler, sigmas), sigmas.new_zeros(1)])
    return list(dict.fromkeys(sampling.timestep(wanted).float().tolist()))


def between(patcher, sampler, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """The sigmas that one of the host's own samplers asks a model for, [1] each; empty for samplers
    from other packs."""
    function = getattr(sampler, "sampler_function", None)
    if len(sigmas) < 2 or not getattr(function, "__module__", "").startswith(HOSTS_OWN):
        return []
    nothing = Nothing(patcher)
    state = torch.zeros(1, 1, 2, 2, device=sigmas.device)
    options = {"model_options": {}, "seed": 0}
    devices = [sigmas.device] if sigmas.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        function(
            nothing,
            state,
            sigmas.clone(),
            extra_args=options,
            callback=None,
            disable=True,
            **sampler.extra_options,
        )
    return nothing.asked


class Nothing:
    """A model that denoises everything to zero and remembers the sigmas it was asked for. It has the
    host's model and patcher where samplers look for them."""

    def __init__(self, patcher):
        guider = SimpleNamespace(inner_model=patcher.model, model_patcher=patcher, model_options={})
        self.inner_model, self.asked = guider, []

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict | None = None, **_
    ) -> torch.Tensor:
        self.asked.append(sigma[:1].float())
        denoised = torch.zeros_like(x)
        seen = {
            name: denoised for name in ("denoised", "cond_denoised", "uncond_denoised", "input")
        }
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            hook({**seen, "sigma": sigma, "cond_scale": 1.0, "model": self.inner_model.inner_model})
        return denoised
