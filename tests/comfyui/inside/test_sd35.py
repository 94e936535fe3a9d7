import pytest

from .conftest import relative_error

pytestmark = pytest.mark.parametrize(
    ("architecture", "host_case"), [("sd35", "sd35"), ("sd35", "sd35_large")], indirect=True
)
TOLERANCE = 1e-4
VARIANTS = {
    "full": "full",
    "depth": "4-5",
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
