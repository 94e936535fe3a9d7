"""Which timesteps a sampler will ask the model for, known before it starts."""

from __future__ import annotations

from types import SimpleNamespace

import torch

HOSTS_OWN = "comfy."


def timesteps_of(patcher, sampler, sigmas: torch.Tensor) -> list[float]:
    """As the model is given them, in float32, each once; 0 is among them, as edit models read it
    for their reference.

    Some samplers evaluate between the sigmas of their schedule. Where they do depends on the
    schedule alone, so the host's own are run on a model that does nothing. Those that decide on the
    way (dpm_adaptive) can't be known.
    """
    sampling = patcher.get_model_object("model_sampling")
    sigmas = sigmas.to(patcher.load_device, torch.float32)
    wanted = torch.cat([sigmas, *between(patcher, sampler, sigmas), sigmas.new_zeros(1)])
    return list(dict.fromkeys(sampling.timestep(wanted).float().tolist()))


def between(patcher, sampler, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """What the host's own sampler asks a model for [1] each; nothing of samplers that come from
    elsewhere."""
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
    """A model that denoises everything to zero and remembers what it was asked for. Samplers look
    for the host's model and patcher inside it."""

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
