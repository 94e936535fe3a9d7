"""Folded modulations in the host: a table draws the very same latents, a basis stays within its
bound, on every variant, with the host's own samplers, guidance on; a new schedule costs one pass, a
known one nothing."""

import json
import sys
from collections import Counter

import comfy.samplers
import comfy.utils
import pytest
import torch

from ..cases import edits
from ..conftest import BOUND
from ..forwards import relative_error
from ..loading.test_stored_fp8 import scaled  # noqa: F401 - a fixture
from .test_parity import QWEN

pytestmark = pytest.mark.usefixtures("loose_bound")
SAMPLERS = [
    name for name in comfy.samplers.SAMPLER_NAMES if name not in ("dpm_adaptive", "dpm_fast")
]
TRAINED_BOUND = 0.01
opened: list[str] = []
sys.addaudithook(
    lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None
)


@pytest.fixture(scope="module")
def demo() -> tuple[str, str]:
    """The bundled teacher and its bundle, which every pack has."""
    return "demo/demo.ppcl.safetensors", "demo/teacher.safetensors"


@pytest.mark.parametrize("variant", QWEN.values(), ids=QWEN)
def test_a_table_draws_the_same_bits(
    whole, of_form, switched, drawn, load, bundle, teacher, variant
):
    for model in (of_form("table"), whole):
        assert (
            type(model.model.diffusion_model.transformer_blocks[0].img_mod[1]).__name__
            == "TableMap"
        ) == (model is not whole)
    expected = drawn(switched(whole, variant=variant))
    assert torch.equal(drawn(switched(of_form("table"), variant=variant)), expected)
    alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False, fold="table")
    assert torch.equal(
        drawn(alone), drawn(load(bundle.name, base=teacher.name, variant=variant, switchable=False))
    )


@edits
@pytest.mark.parametrize("variant", ["full", "small", "smallest", "1-2,text:3-4"])
def test_a_basis_stays_near(whole, of_form, switched, drawn, load, bundle, teacher, variant):
    expected = drawn(switched(whole, variant=variant))
    actual = drawn(switched(of_form("basis"), variant=variant))
    alone = drawn(
        load(bundle.name, base=teacher.name, variant=variant, switchable=False, fold="basis")
    )
    assert (
        0 < relative_error(actual, expected) < BOUND and 0 < relative_error(alone, expected) < BOUND
    )


@edits
@pytest.mark.parametrize(("samples", "equal"), [(1, True), (1, False), (3, True), (3, False)])
def test_every_number_of_samples(whole, of_form, drawn, samples, equal):
    """Prompts of equal length go through the model together, others one after the other: other
    kernels, other bits."""
    options = {"samples": samples, "equal": equal}
    assert torch.equal(drawn(of_form("table"), **options), drawn(whole, **options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(whole, of_form, drawn, sampler):
    """Samplers that evaluate between the sigmas of their schedule included."""
    assert torch.equal(
        drawn(of_form("table"), sampler=sampler, steps=4), drawn(whole, sampler=sampler, steps=4)
    )


def test_a_sampler_that_decides_on_the_way(of_form, drawn):
    with pytest.raises(
        ValueError,
        match="no timestep .*, which this sampler chose on its way: .* or fold with form basis",
    ):
        drawn(of_form("table"), sampler="dpm_adaptive")
    assert drawn(of_form("basis"), sampler="dpm_adaptive").isfinite().all()


def test_a_new_schedule_costs_one_pass_and_a_known_one_nothing(
    load, bundle, teacher, drawn, whole, models, monkeypatch
):
    steps_of = Counter()  # by total: what the host's progress bars were told
    told = comfy.utils.ProgressBar.update
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update",
        lambda bar, step: (steps_of.update({bar.total: step}), told(bar, step)),
    )

    def files(steps: int, model) -> list[str]:
        start = len(opened)
        assert torch.equal(drawn(model, steps=steps), drawn(whole, steps=steps))
        roots = (str(models.ppcl), str(models.diffusion_models))
        return [name for name in opened[start:] if name.startswith(roots)]

    model = load(bundle.name, base=teacher.name, fold="table")
    first, modulations = files(6, model), len(model.model.diffusion_model.ppcl.later.stored)
    assert steps_of[modulations] == modulations  # a step each
    # weight and bias of each, once
    assert sum(name.endswith(teacher.name) for name in first) == 2 * 2 * 6
    assert files(6, model) == []
    assert files(5, model) and files(6, model) == [] and files(5, model) == []
    again = load(bundle.name, base=teacher.name, fold="table")  # its table is on disk now
    found = files(6, again)
    assert found and not any(name.endswith(teacher.name) for name in found)


@pytest.fixture(scope="module")
def demo_drawn(run_node):
    """Two captions of the demo, guidance on."""
    captions = "a white K on a blue circle, yellow background\na red 7 on a white hexagon, green background"
    positive, negative, latent = run_node("PPCL_DemoCaption", captions=captions)

    def run(model, steps: int = 2):
        (model,) = run_node("ModelSamplingAuraFlow", model=model, shift=1.0)
        return run_node(
            "KSampler",
            model=model,
            seed=3,
            steps=steps,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]

    return run


@pytest.mark.parametrize("switchable", [True, False], ids=["switched", "alone"])
def test_every_variant_of_the_bundled_teacher(
    load, switched, demo, demo_drawn, pack, monkeypatch, switchable
):
    """Alone, each is a load of its own, so that only three are tried."""
    monkeypatch.setattr(pack("loading.fold_on_load"), "BOUND", TRAINED_BOUND)
    models, drawn = {}, {}
    between = ("large", "medium") if switchable else ()
    for variant in ("full", *between, "small", "smallest"):
        for form in ("off", "table", "basis"):
            options = {
                "base": demo[1],
                "weight_dtype": "fp32",
                "fold": form,
                "switchable": switchable,
            }
            if switchable:
                model = models.setdefault(form, None) or load(demo[0], variant="full", **options)
                models[form] = model
                model = switched(model, variant=variant)
            else:
                model = load(demo[0], variant=variant, **options)
            drawn[form] = demo_drawn(model)
        assert torch.equal(drawn["table"], drawn["off"])
        assert 0 < relative_error(drawn["basis"], drawn["off"]) < 3 * TRAINED_BOUND


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_only_what_is_left_is_loaded(load, demo, pack, figures, form, variant):
    """Where the model was folded before; of the bundled teacher, whose vectors are few."""
    reading, paths = pack("loading"), pack("paths")
    request = reading.Request(
        path=paths.model_path(demo[0]),
        base=paths.model_path(demo[1]),
        variant=variant,
        switchable=False,
        fold=form,
    )
    model = load(
        demo[0], base=demo[1], variant=variant, switchable=False, fold=form, weight_dtype="bf16"
    )
    content = reading.content_of(request, make_fold=pack("loading.fold_on_load").make_fold)
    held = sum(t.nbytes for t in model.model.diffusion_model.state_dict().values())
    figures("folded_load_bytes_ratio", content.bytes_read / held)
    assert 0.98 < content.bytes_read / held <= 1.02


def test_fp8(load, bundle, teacher, drawn):
    """The table is of the model that would run unfolded; small maps stay as they are."""
    options = {
        "base": teacher.name,
        "variant": "smallest",
        "switchable": False,
        "weight_dtype": "fp8_e4m3fn",
    }
    whole = load(bundle.name, **options)
    assert torch.equal(drawn(load(bundle.name, **options, fold="table")), drawn(whole))
    basis = load(bundle.name, **options, fold="basis")
    assert (
        basis.model.diffusion_model.transformer_blocks[0].img_mod[1].weight.dtype is torch.float32
    )
    assert relative_error(drawn(basis), drawn(whole)) < BOUND


def test_a_base_that_is_stored_in_scaled_fp8(load, bundle, scaled, drawn):  # noqa: F811
    options = {
        "base": scaled.name,
        "variant": "smallest",
        "switchable": False,
        "weight_dtype": "default",
    }
    expected = drawn(load(bundle.name, **options))
    assert torch.equal(drawn(load(bundle.name, **options, fold="table")), expected)
    assert 0 < relative_error(drawn(load(bundle.name, **options, fold="basis")), expected) < BOUND


def test_bf16(load, bundle, teacher, drawn):
    options = {
        "base": teacher.name,
        "variant": "smallest",
        "switchable": False,
        "weight_dtype": "bf16",
    }
    assert torch.equal(
        drawn(load(bundle.name, **options, fold="table")), drawn(load(bundle.name, **options))
    )


def test_counted_without_weights(pack, empty_host_model):
    """Qwen-Image's real shapes: every tensor of a folded model has a home."""
    from ppcl_engine.architectures import architecture_named
    from ppcl_engine.architectures.folded import Folding
    from ppcl_engine.models.weights import expected_shapes

    architecture, host = architecture_named("qwen_image"), pack("host.qwen_image").HOST
    for form, inputs in (("table", 20), ("basis", 33)):
        config = {
            **architecture.model_configs["qwen_image"],
            "folding": Folding(form=form, inputs=inputs).to_config(),
        }
        shapes = expected_shapes(architecture, config)
        tensors = {
            n: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for n, shape in shapes.items()
        }
        hints = torch.tensor(
            list(json.dumps({"folding": config["folding"]}).encode()), dtype=torch.uint8
        )
        tensors["ppcl_hints"] = hints
        model = empty_host_model(host, tensors)
        assert 13.6 < sum(p.numel() for p in model.parameters()) / 1e9 < 13.72
