"""FLUX: what a variant computes in the host is what the engine computes, to 1e-4 of its size (fp32, one forward, with
guidance and pooled text)."""

import pytest
import torch

from .conftest import relative_error

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
TOLERANCE = 1e-4
VARIANTS = {
    "full": "full",
    "double": "1-2",
    "single": "6-7",
    "the last": "9-10",
    "all intervals": "small",
    "paper FFN": "ffn_text:0",
    "paper FFN of a student": "1-2,ffn_image:1",
    "gated FFN": "ffn_image:3",
    "joint FFN": "ffn_joint:5",
    "joint FFN of a student": "6-7,ffn_joint:6",
    "joint FFN of the teacher's": "ffn_joint:6",
    "text": "1-2,text:3-4",
    "text and FFN": "1-2,ffn_image:3,text:3-4",
    "all": "smallest",
}


@pytest.fixture(scope="module")
def whole(load, bundle, teacher):
    return load(bundle.name, base=teacher.name)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_a_switchable_model(whole, switched, velocity, engine_velocity, bundle, teacher, variant, figures):
    error = relative_error(velocity(switched(whole, variant=variant)), engine_velocity(bundle, variant, teacher))
    figures("parity_relative_error", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_loaded_alone(load, velocity, engine_velocity, bundle, teacher, variant, figures):
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
    error = relative_error(velocity(model), engine_velocity(bundle, variant, teacher))
    figures("parity_relative_error", error)
    assert error < TOLERANCE


def test_variants_differ(whole, switched, velocity):
    found = [velocity(switched(whole, variant=variant)) for variant in VARIANTS.values()]
    for i, one in enumerate(found):
        assert all(relative_error(one, other) > 10 * TOLERANCE for other in found[:i])


def test_guidance_and_pooled_text_are_read(whole, switched, velocity, inputs):
    model = switched(whole, variant="smallest")
    plain = velocity(model)
    for more in ({"guidance": 1.0}, {"pooled_output": torch.ones(1, 20)}):
        assert relative_error(velocity(model, positive=[[inputs.text, {**inputs.more, **more}]]), plain) > 0.01
