"""A file of no known architecture: the line says what it is most like."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.other_models import unknown_model

from ..tiny.models import tiny_model

MARKS = {
    "flux1": "context_embedder.weight",
    "sd35": "pos_embed.pos_embed",
    "qwen_image": "img_in.weight",
}


@pytest.mark.parametrize("name", MARKS)
def test_a_model_without_what_marks_it_is_still_called_by_its_name(name):
    names = set(tiny_model(architecture_named(name)).state_dict()) - {MARKS[name]}
    assert unknown_model(names, Path("a.safetensors")) == (
        f"a.safetensors looks like {name}, but lacks 1 tensors, first {MARKS[name]}; it is incomplete"
    )
