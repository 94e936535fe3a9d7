"""What a variant computes in the host is what the engine computes, to 1e-4 of its size (fp32, one forward), with an edit
model's references in the sequence and without."""

import pytest

from .conftest import edits, relative_error

TOLERANCE = 1e-4
VARIANTS = {
    "full": "full",
    "depth": "3-4",
    "correction": "1-2",
    "both intervals": "small",
    "paper FFN": "ffn_text:0",
    "paper FFN of a student": "1-2,ffn_image:1",
    "gated FFN": "ffn_image:3",
    "text": "1-2,text:3-4",
    "text of a student": "1-2,3-4,text:3-4",
    "text and FFN": "1-2,ffn_image:3,text:3-4",
    "all": "smallest",
}


@pytest.fixture(scope="module")
def whole(load, bundle, teacher):
    return load(bundle.name, base=teacher.name)


@edits
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_a_switchable_model(whole, switched, velocity, engine_velocity, bundle, teacher, variant, figures):
    error = relative_error(velocity(switched(whole, variant=variant)), engine_velocity(bundle, variant, teacher))
    figures("parity_relative_error", error)
    assert error < TOLERANCE


@edits
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_loaded_alone(load, velocity, engine_velocity, bundle, teacher, variant, figures):
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
    error = relative_error(velocity(model), engine_velocity(bundle, variant, teacher))
    figures("parity_relative_error", error)
    assert error < TOLERANCE


@edits
def test_variants_differ(whole, switched, velocity):
    found = [velocity(switched(whole, variant=variant)) for variant in VARIANTS.values()]
    for i, one in enumerate(found):
        assert all(relative_error(one, other) > 10 * TOLERANCE for other in found[:i])


@edits
def test_our_standalone_in_both_loaders(load, run_node, velocity, engine_velocity, exported, models):
    """The host's own UNETLoader reads it too, once the pack is there."""
    path = exported(models.diffusion_models, "ppcl", "alone", "smallest")
    expected = engine_velocity(path)
    assert relative_error(velocity(load(path.name)), expected) < TOLERANCE
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert relative_error(velocity(model), expected) < TOLERANCE


@pytest.mark.parametrize("references", [((4, 8),)], indirect=True)
def test_references_are_read(whole, switched, velocity, inputs):
    model = switched(whole, variant="smallest")
    (picture,) = inputs.more["reference_latents"]
    plain, alone = velocity(model), velocity(model, positive=[[inputs.text, {}]])
    other = velocity(model, positive=[[inputs.text, {"reference_latents": [-picture]}]])
    assert relative_error(alone, plain) > 0.01 and relative_error(other, plain) > 0.01
