"""What is in memory together while a pipeline's parts take turns."""

from __future__ import annotations

import weakref

from ppcl_engine.data.codecs.pipeline import PipelineCodec
from ppcl_engine.stages import benchmark
from ppcl_engine.stages.assess import evaluate, generate


def check_one_model_at_a_time(monkeypatch) -> list[weakref.ref]:
    """From now on the VAE must find neither a transformer nor a text encoder in memory. Returns the
    transformers that come and go."""
    transformers: list[weakref.ref] = []

    def watched(module, name: str) -> None:
        opened = getattr(module, name)

        def open_and_remember(*arguments):
            model = opened(*arguments)
            transformers.append(weakref.ref(model))
            return model

        monkeypatch.setattr(module, name, open_and_remember)

    def checked(name: str) -> None:
        original = getattr(PipelineCodec, name)

        def check(codec, tensor):
            assert codec._text_pipeline is None and all(model() is None for model in transformers)
            return original(codec, tensor)

        monkeypatch.setattr(PipelineCodec, name, check)

    watched(evaluate, "open_variant")
    watched(benchmark, "open_variant")
    watched(generate, "open_model")
    checked("pictures")
    checked("latents")
    return transformers
