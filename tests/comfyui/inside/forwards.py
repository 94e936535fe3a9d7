"""Fixtures and functions that run a MODEL by the host and the same model by the engine. conftest imports
the fixtures, so that every test here has them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management
import comfy.samplers
import pytest
import torch

from ppcl_engine.architectures import REFERENCES
from ppcl_engine.models.opening import open_model


@pytest.fixture(scope="module")
def references(request) -> tuple[tuple[int, int], ...]:
    """None, or what a test names by `edits`."""
    return getattr(request, "param", ())


@pytest.fixture(scope="module")
def inputs(host_case, architecture, references) -> SimpleNamespace:
    """One forward that host and engine compute alike: batch 1, unpadded text, even grid. more: what
    the host's conditioning has beside the text; captions: the same for the engine; grid: of all
    pictures."""
    generator = torch.Generator().manual_seed(5)
    latents, text = (
        torch.randn(1, 16, 1, 8, 12, generator=generator),
        torch.randn(1, 7, host_case.text, generator=generator),
    )
    more, captions = {}, {"encoder_hidden_states": text}
    if host_case.pooled:
        more["pooled_output"] = captions["pooled_projections"] = torch.randn(
            1, host_case.pooled, generator=generator
        )
    if host_case.guidance:
        more["guidance"], captions["guidance"] = (
            host_case.guidance,
            torch.tensor([host_case.guidance]),
        )
    latents = latents if host_case.frames else latents[:, :, 0]
    pictures = [torch.randn(1, 16, 1, *size, generator=generator) for size in references]
    if pictures:
        more["reference_latents"] = [
            comfy.latent_formats.Wan21().process_out(picture) for picture in pictures
        ]
        captions[REFERENCES] = torch.cat(
            [architecture.pack(flat(picture)) for picture in pictures], dim=1
        )
    grid = torch.cat([architecture.grid(picture) for picture in (latents, *pictures)])
    return SimpleNamespace(
        latents=latents, text=text, sigma=0.7, more=more, captions=captions, grid=grid
    )


@pytest.fixture(scope="module")
def velocity(inputs):
    """One forward of a MODEL by the host's own way of sampling: loaded, patched, wrapped."""

    def run(model, positive=None, cfg: float = 1.0) -> torch.Tensor:
        velocities = []

        def once(wrapped, x, sigmas, extra_args=None, callback=None, disable=None):
            denoised = wrapped(inputs.latents, torch.full((1,), inputs.sigma), **(extra_args or {}))
            velocities.append((inputs.latents - denoised) / inputs.sigma)
            return x

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(
            positive or [[inputs.text, inputs.more]], [[inputs.text[:, ::2], inputs.more]]
        )
        guider.set_cfg(cfg)
        empty = torch.zeros_like(inputs.latents)
        with torch.inference_mode():
            guider.sample(
                torch.zeros_like(empty),
                empty,
                comfy.samplers.KSAMPLER(once),
                torch.tensor([1.0, 0.0]),
            )
        return flat(velocities[0]).clone()

    return run


@pytest.fixture
def as_loaded(monkeypatch):
    """Meanwhile sampling loads nothing more: weights stay off the device, and are cast and patched
    when they are used."""

    @contextmanager
    def stay():
        with monkeypatch.context() as patch:
            patch.setattr(
                comfy.model_management, "load_models_gpu", lambda *arguments, **named: None
            )
            yield

    return stay


@pytest.fixture(scope="module")
def engine_velocity(inputs, architecture):
    """The same forward by the engine."""

    def run(path: Path, *arguments, **options) -> torch.Tensor:
        model = open_model(path, *arguments, **options)
        return engine_forward(architecture, model, inputs)

    return run


@pytest.fixture
def opened(load, run_node, engine_velocity, velocity):
    """What a file gives, by whatever opens it."""

    def run(path: Path) -> dict[str, torch.Tensor]:
        (stock,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
        return {
            "ours": velocity(load(path.name)),
            "host": velocity(stock),
            "engine": engine_velocity(path),
        }

    return run


@pytest.fixture(scope="module")
def drawn(run_node, inputs):
    """Latents that the host's own sampler draws."""

    def run(
        model,
        steps: int = 3,
        sampler: str = "euler",
        samples: int = 1,
        cfg: float = 2.0,
        equal: bool = True,
    ):
        text = inputs.text.expand(samples, -1, -1)
        negative = -text if equal else text[:, ::2]
        empty = torch.zeros(samples, *inputs.latents.shape[1:])
        (latents,) = run_node(
            "KSampler",
            model=model,
            seed=3,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler="simple",
            positive=[[text, inputs.more]],
            negative=[[negative, inputs.more]],
            latent_image={"samples": empty},
            denoise=1.0,
        )
        return latents["samples"]

    return run


def engine_forward(architecture, model, inputs) -> torch.Tensor:
    tokens = architecture.pack(flat(inputs.latents))
    rows = {"hidden_states": tokens, "timestep": torch.tensor([inputs.sigma]), "grid": inputs.grid}
    with torch.no_grad():
        tokens = architecture.call(
            model, {**rows, **inputs.captions, "encoder_hidden_states": inputs.text}
        )
    return architecture.unpack(tokens, inputs.grid)


def calls_of(model) -> list[tuple[torch.Tensor, ...]]:
    """(latents, sigmas, text, velocity) of every forward from now on."""
    heard = []

    def hear(executor, x, t, context, *arguments, **named):
        result = executor(x, t, context, *arguments, **named)
        heard.append((flat(x).clone(), t.clone(), context.clone(), flat(result).clone()))
        return result

    model.add_wrapper_with_key("diffusion_model", "test", hear)
    return heard


def velocity_of(
    calls: list[tuple[torch.Tensor, ...]],
    latents: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """What the model returned for these latents, this timestep and this text, out of all its calls."""
    matching = [
        velocities[row]
        for all_latents, timesteps, texts, velocities in calls
        for row in range(len(all_latents))
        if torch.equal(all_latents[row], latents)
        and timesteps[row] == t
        and torch.equal(texts[row], text)
    ]
    assert matching, "the model was never called with this row"
    return matching[0]


def flat(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :, 0] if latents.ndim == 5 else latents


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
