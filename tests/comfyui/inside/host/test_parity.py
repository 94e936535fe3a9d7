"""What a variant computes in the host is what the engine computes, to 1e-4 of its size (fp32, one
forward, with what else an architecture's conditioning has: pooled text, guidance, an edit model's
references in the sequence)."""

import pytest
import torch

from ..cases import CASES, EDITS
from ..forwards import relative_error

TOLERANCE = 1e-4
QWEN = {
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
FLUX = {
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
SD35 = {
    "full": "full",
    "depth": "4-5",
    "attends twice": "1-3",
    "all intervals": "small",
    "paper FFN": "ffn_text:0",
    "paper FFN of a student": "1-3,ffn_image:1",
    "paper FFN of the teacher's": "ffn_image:1",
    "gated FFN": "ffn_image:0",
    "FFN of the last": "ffn_image:7",
    "text": "1-3,text:4-5",
    "text of a student": "1-3,4-5,text:4-5",
    "text of the last": "text:7-7",
    "text and FFN": "1-3,text:4-5,ffn_image:7,text:7-7",
    "all": "smallest",
}
Z_IMAGE = {
    "full": "full",
    "the last": "4-5",
    "correction": "1-2",
    "both intervals": "small",
    "paper FFN": "ffn_joint:0",
    "paper FFN of a student": "1-2,ffn_joint:1",
    "paper FFN of the teacher's": "ffn_joint:1",
    "gated FFN": "ffn_joint:3",
    "all": "smallest",
}
VARIANTS = {
    "teacher": QWEN,
    "flux": FLUX,
    "sd35": SD35,
    "sd35_large": SD35,
    "z_image": Z_IMAGE,
    "krea2": Z_IMAGE,
}
ROWS = {
    name: (case.architecture, name, ()) for name, case in CASES.items() if case.file in VARIANTS
}
ROWS["qwen_image with references"] = ("qwen_image", "qwen_image", EDITS["references"])
pytestmark = pytest.mark.parametrize(
    ("architecture", "host_case", "references"), ROWS.values(), ids=ROWS, indirect=True
)


@pytest.fixture
def variants(host_case) -> dict[str, str]:
    return VARIANTS[host_case.file]


def test_variants_of_a_switchable_model(
    whole, switched, velocity, engine_velocity, bundle, teacher, variants, figures
):
    for name, variant in variants.items():
        error = relative_error(
            velocity(switched(whole, variant=variant)), engine_velocity(bundle, variant, teacher)
        )
        figures("parity_relative_error", error)
        assert error < TOLERANCE, name


def test_variants_loaded_alone(load, velocity, engine_velocity, bundle, teacher, variants, figures):
    for name, variant in variants.items():
        model = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
        error = relative_error(velocity(model), engine_velocity(bundle, variant, teacher))
        figures("parity_relative_error", error)
        assert error < TOLERANCE, name


def test_variants_differ(whole, switched, velocity, variants):
    velocities = [velocity(switched(whole, variant=variant)) for variant in variants.values()]
    for i, one in enumerate(velocities):
        assert all(relative_error(one, other) > 10 * TOLERANCE for other in velocities[:i])


@pytest.mark.parametrize("variant", ["small", "smallest"])
def test_our_standalone_in_both_loaders(
    load, run_node, velocity, engine_velocity, exported, models, host_case, variant
):
    """The host's own UNETLoader reads it too, once the pack is there."""
    path = exported(models.diffusion_models, "ppcl", f"{host_case.file}_{variant}", variant)
    expected = engine_velocity(path)
    assert relative_error(velocity(load(path.name)), expected) < TOLERANCE
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert relative_error(velocity(model), expected) < TOLERANCE


def test_all_of_the_conditioning_is_read(whole, switched, velocity, inputs, references):
    model = switched(whole, variant="smallest")
    plain = velocity(model)
    others = {"guidance": 1.0, "pooled_output": torch.ones(1, 20)}
    others["reference_latents"] = [-picture for picture in inputs.more.get("reference_latents", [])]
    for name in inputs.more:
        changed = {**inputs.more, name: others[name]}
        assert relative_error(velocity(model, positive=[[inputs.text, changed]]), plain) > 0.01
    if references:
        assert relative_error(velocity(model, positive=[[inputs.text, {}]]), plain) > 0.01
