"""What a user can get wrong is one clear line, and the next request works."""

import json
from importlib.util import find_spec

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.bundle import PLAN_KEY, write_bundle
from ppcl_engine.models.stored_layout import STRUCTURE_TENSOR
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.system.tensor_files import TensorFile, write_tensors


@pytest.fixture(scope="module")
def files(broken_files, hostile_bundles, bundle, teacher) -> tuple[str, str]:
    """The good bundle and its base, with the others beside them."""
    return bundle.name, teacher.name


@pytest.fixture(scope="module")
def broken_files(models, teacher, make_model, save_model) -> None:
    """Files that are damaged, or that hold something else."""
    folder = models.diffusion_models
    data = teacher.read_bytes()
    (folder / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "text.safetensors").write_text("no model")
    write_tensors(folder / "other_model.safetensors", {"layer.weight": torch.zeros(2, 2)})
    save_model(
        folder / "other_teacher.safetensors", make_model(seed=9, in_channels=64, out_channels=16)
    )
    save_model(
        folder / "shallow.safetensors", make_model(num_layers=3, in_channels=64, out_channels=16)
    )
    broken = TensorFile(teacher).read_all() | {
        STRUCTURE_TENSOR: torch.full((8,), 200, dtype=torch.uint8)
    }
    write_tensors(folder / "broken_plan.safetensors", broken)
    short = {
        name: tensor
        for name, tensor in TensorFile(teacher).read_all().items()
        if ".3.attn.to_k" not in name
    }
    write_tensors(folder / "short.safetensors", short, TensorFile(teacher).metadata)
    _write_without_nodes(models, "qwen_image_21", "qwen21")
    _write_without_nodes(models, "krea2", "krea2")


def _write_without_nodes(models, name: str, file: str) -> None:
    """A file and a bundle of an architecture that the nodes do not know, or that an older ComfyUI
    does not."""
    architecture = architecture_named(name)
    config, shapes = (
        architecture.tiny_config,
        expected_shapes(architecture, architecture.tiny_config),
    )
    write_tensors(
        models.diffusion_models / f"{file}.safetensors",
        {architecture.to_comfyui(key).name: torch.zeros(1) for key in shapes},
    )
    plan = PruningPlan(
        architecture=architecture.name,
        config=config,
        num_blocks=6,
        fingerprint="f",
        intervals=parse_intervals("1-2"),
    )
    write_bundle(models.ppcl / f"{file}.ppcl.safetensors", plan, [])


@pytest.fixture(scope="module")
def hostile_bundles(models, bundle) -> None:
    """Bundles whose plan describes no model."""
    file = TensorFile(bundle)
    plan, tensors = json.loads(file.metadata[PLAN_KEY]), file.read_all()

    def hostile(name: str, changes: dict, **more: torch.Tensor) -> None:
        text = json.dumps({**plan, **changes})
        write_tensors(
            models.ppcl / f"{name}.ppcl.safetensors", {**tensors, **more}, {PLAN_KEY: text}
        )

    hostile("many_blocks", {"num_blocks": 10**9})
    hostile("outside", {"intervals": [{**plan["intervals"][0], "last": 77}]})
    hostile(
        "rank",
        {
            "intervals": [{**plan["intervals"][0], "correction": "99999999"}],
            "variants": [],
            "sites": [],
        },
    )
    hostile("unknown_field", {"surprise": 1})
    hostile("config", {"config": {}})
    less = {name: tensor for name, tensor in tensors.items() if "1-2.attn.to_q" not in name}
    write_tensors(models.ppcl / "lacking.ppcl.safetensors", less, {PLAN_KEY: json.dumps(plan)})


KREA2_HERE = (
    "variant 'small' is not in the plan"
    if find_spec("comfy.ldm.krea2")
    else "krea2 needs a newer ComfyUI, since this one does not know it; update ComfyUI"
)
WRONG = {
    "a model without nodes": (
        {"file": "qwen21.safetensors"},
        "qwen21.safetensors is qwen_image_21, which has no nodes yet (qwen_image, flux1, sd35, z_im",
    ),
    "a bundle of it": (
        {"file": "qwen21.ppcl.safetensors"},
        "qwen_image_21 has no nodes yet (qwen_image, ",
    ),
    "an architecture of newer hosts": ({"file": "krea2.ppcl.safetensors"}, KREA2_HERE),
    "no such file": ({"file": "../secrets.safetensors"}, "is neither in"),
    "truncated": ({"file": "truncated.safetensors"}, "is truncated"),
    "no model": ({"file": "text.safetensors"}, "not a safetensors file"),
    "another model": (
        {"file": "other_model.safetensors"},
        "is not a model of a supported architecture",
    ),
    "a tensor is missing": ({"file": "short.safetensors"}, "lacks 2 tensors"),
    "broken plan": ({"file": "broken_plan.safetensors"}, "plan is not readable"),
    "no base": ({"base": "none"}, "choose as base"),
    "base of another model": ({"base": "other_model.safetensors"}, "is not a qwen_image model"),
    "base of another teacher": ({"base": "other_teacher.safetensors"}, "is not the teacher"),
    "base of another depth": (
        {"base": "shallow.safetensors"},
        "has 3 blocks, the bundle's teacher has 6",
    ),
    "a base where none belongs": ({"file": "shallow.safetensors"}, "takes no base model"),
    "unknown variant": ({"variant": "huge"}, "variant 'huge' is not in the plan"),
    "unknown dtype": (
        {"weight_dtype": "int1"},
        "weight_dtype 'int1' is not a choice; choose from default, bf16",
    ),
    "unknown preset": (
        {"file": "shallow.safetensors", "base": "none", "preset": "x"},
        "preset 'x' is not a choice; choose from auto",
    ),
    "preset of another depth": (
        {"file": "shallow.safetensors", "base": "none", "preset": "Qwen-Image-12B"},
        "the preset names",
    ),
    "no intervals": (
        {"file": "shallow.safetensors", "base": "none", "preset": "by intervals", "intervals": "a"},
        "'a' is not an interval",
    ),
    "a plan of a billion blocks": (
        {"file": "many_blocks.ppcl.safetensors"},
        "num_blocks should be less",
    ),
    "an interval outside": ({"file": "outside.ppcl.safetensors"}, "interval 1-77 is not inside"),
    "a huge rank": ({"file": "rank.ppcl.safetensors"}, "correction should match"),
    "an unknown field": ({"file": "unknown_field.ppcl.safetensors"}, "unknown field 'surprise'"),
    "no configuration": (
        {"file": "config.ppcl.safetensors"},
        "the model configuration in the plan lacks 'num_layers'; restore the plan",
    ),
    "a student lacks tensors": ({"file": "lacking.ppcl.safetensors"}, "lacks 2 tensors"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("switchable", [True, False])
def test_one_line(load, files, case, switchable):
    changes, message = WRONG[case]
    widgets = {
        "file": files[0],
        "base": files[1],
        "switchable": switchable,
        "variant": "small",
        **changes,
    }
    if (
        "base" not in changes
        and not widgets["file"].endswith(".ppcl.safetensors")
        and "takes no base" not in message
    ):
        widgets["base"] = "none"
    with pytest.raises(ValueError) as caught:
        load(**widgets)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert load(files[0], base=files[1]).model.diffusion_model.ppcl.plan


def test_switches_that_make_no_sense(load, switched, files):
    model, plain = load(files[0], base=files[1]), load(files[1])
    for widgets, message in (
        ({"variant": "huge"}, "variant 'huge' is not in the plan"),
        ({"on": "2-5"}, "interval '2-5' is not in the plan"),
        ({"off": "text:1-1"}, "width site 'text:1-1' is not in the plan"),
    ):
        with pytest.raises(ValueError, match=message):
            switched(model, **widgets)
    with pytest.raises(ValueError, match="not a PPCL bundle"):
        switched(plain, variant="full")


def test_parts_on_and_off_by_size_and_stacked(load, switched, files, pack):
    model = load(files[0], base=files[1], variant="full")
    variant_of = pack("host.switching").variant_of
    one = switched(model, on="1-2")
    assert variant_of(one).intervals == ("1-2",)
    two = switched(one, on="3-4, ffn_image:1")
    assert set(variant_of(two).intervals) == {"1-2", "3-4"} and variant_of(two).sites == (
        "ffn_image:1",
    )
    assert variant_of(switched(two, off="1-2")).intervals == ("3-4",)
    assert variant_of(one).intervals == ("1-2",) and variant_of(model).name == "full"
    assert variant_of(switched(two, variant="by size", size=1.0)).name == "full"
    everything = variant_of(switched(model, variant="by size", size=0.0))
    assert len(everything.intervals) == 2 and len(everything.sites) == 4
