"""Hosts that move a weight when it is used (the default on NVIDIA cards since 0.16) build maps
without tensors, and fill them with those of the file. That can be switched on without such a card,
as far as building goes."""

from __future__ import annotations

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sd
import pytest
import torch

from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..conftest import BOUND
from ..forwards import relative_error
from ..quantised import KINDS, stored

memory = pytest.importorskip("comfy.memory_management", reason="this host has no dynamic memory")
everywhere = pytest.mark.parametrize("architecture", ["qwen_image", "flux1", "sd35"], indirect=True)
fill = comfy.model_base.BaseModel.load_model_weights


@pytest.fixture
def building(monkeypatch):
    """As with dynamic memory; what is built then runs on this machine's own memory."""

    def filled(self, tensors, prefix="", assign=False):
        return fill(self, tensors, prefix, assign=True)

    def build(make):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "aimdo_enabled", True)
            patch.setattr(comfy.model_base.BaseModel, "load_model_weights", filled)
            return make()

    return build


def test_the_host_builds_without_tensors(building):
    linear = building(lambda: comfy.ops.disable_weight_init.Linear(3, 4))
    assert linear.weight is None and linear.bias is None


@everywhere
@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
@pytest.mark.parametrize("switchable", [True, False], ids=["switched", "alone"])
def test_a_bundle(load, velocity, building, bundle, teacher, pack, variant, switchable):
    def make():
        return load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)

    expected, model = make(), building(make)
    tensors = pack("host.switching").tensors_in
    theirs, ours = tensors(expected.model.diffusion_model), tensors(model.model.diffusion_model)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(tensor, ours[name]) for name, tensor in theirs.items()
    )
    assert torch.equal(velocity(model), velocity(expected))


@everywhere
@pytest.mark.parametrize("layout", ["comfyui", "ppcl"])
def test_a_standalone(load, velocity, building, exported, models, layout, host_case):
    plain = {"teacher": "3-4", "flux": "9-10", "sd35": "4-5"}[host_case.file]
    name = f"{host_case.file}_dynamic_{layout}"
    path = exported(
        models.diffusion_models, layout, name, plain if layout == "comfyui" else "smallest"
    )
    expected = velocity(load(path.name))
    assert torch.equal(velocity(building(lambda: load(path.name))), expected)
    tensors = TensorFile(path).read_all()  # the host's own reading of files needs such a card
    stock = building(lambda: comfy.sd.load_diffusion_model_state_dict(tensors))
    assert torch.equal(velocity(stock), expected)


@pytest.mark.parametrize("architecture", ["qwen_image"], indirect=True)
@pytest.mark.parametrize("switchable", [True, False], ids=["switched", "alone"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_folded(load, drawn, building, bundle, teacher, loose_bound, form, switchable):
    options = {"base": teacher.name, "variant": "smallest", "switchable": switchable}
    expected = drawn(load(bundle.name, **options))
    actual = drawn(building(lambda: load(bundle.name, **options, fold=form)))
    assert (
        torch.equal(actual, expected)
        if form == "table"
        else relative_error(actual, expected) < BOUND
    )


@pytest.mark.parametrize(
    ("architecture", "host_case"), [("flux1", "flux1_wide")], ids=["flux1"], indirect=True
)
@pytest.mark.parametrize("kind", ["scaled fp8", "nvfp4"])
def test_quantised(load, velocity, building, bundle, host_tensors, teacher, models, kind):
    tensors, _, metadata = stored(host_tensors, KINDS[kind])
    path = models.diffusion_models / f"dynamic {kind}.safetensors"
    write_tensors(path, tensors, TensorFile(teacher).metadata | metadata)
    for switchable in (True, False):
        options = {"variant": "smallest", "switchable": switchable, "weight_dtype": "default"}
        expected = velocity(load(bundle.name, base=path.name, **options))
        assert torch.equal(
            velocity(building(lambda o=options: load(bundle.name, base=path.name, **o))), expected
        )


@everywhere
@pytest.mark.usefixtures("loose_bound")
def test_a_change_on_the_way_to_the_device(load, bundle, teacher, pack, host_case):
    """Covers every map that is stored in a form that patches do not know: cut or folded. The host
    hangs its patch on the map, and calls it with the stored weight."""
    form = "basis" if host_case.architecture == "qwen_image" else "off"
    model = load(bundle.name, base=teacher.name, variant="smallest", switchable=False, fold=form)
    kind, count = pack("host.adapters").PatchedWhole, 0
    for name, module in model.model.diffusion_model.named_modules():
        if not isinstance(module, kind):
            continue
        key, whole = f"diffusion_model.{name}.weight", module.whole("weight", module.weight)
        change = torch.randn(whole.shape, generator=torch.Generator().manual_seed(count))
        patch = comfy.model_patcher.LowVramPatch(
            key, {key: [(1.0, ("diff", (change,)), 1.0, None, None)]}
        )
        module.weight_lowvram_function, count = patch, count + 1
        with torch.inference_mode():
            type(module).forward(
                module, torch.zeros(1, module.in_features * (2 if form == "basis" else 1))
            )
            expected = module.left("weight", whole + change, module.weight)
            assert relative_error(module.weight_lowvram_function(module.weight), expected) < 1e-6
    assert count


def test_a_model_without_it(pack, bundle, teacher, monkeypatch):
    """What the host asks for by itself, where conditioning has a LoRA of its own."""

    class Dynamic(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    path = pack("paths").model_path
    request = pack("loading.request").Request(path=path(bundle.name), base=path(teacher.name))
    make, arguments = pack("use.patcher").load_patcher(request, "fp32")[0].cached_patcher_init
    assert type(make(*arguments)) is Dynamic
    assert type(make(*arguments, disable_dynamic=True)) is comfy.model_patcher.ModelPatcher


@everywhere
def test_a_clone_on_another_copy_of_the_model(load, switched, velocity, bundle, teacher):
    """As the host makes one without dynamic memory, and one for each device: a variant runs on the
    clone's own weights."""
    model = switched(load(bundle.name, base=teacher.name, variant="small"), variant="smallest")
    expected = velocity(model)
    clone = model.clone(force_deepcopy=True)
    assert clone.model is not model.model
    for parameter in model.model.parameters():
        parameter.data.zero_()
    assert torch.equal(velocity(clone), expected)


def test_a_table_that_grows(load, drawn, bundle, teacher, loose_bound):
    """Hosts keep memory of a map's first size with the map."""
    model = load(bundle.name, base=teacher.name, variant="small", fold="table")
    drawn(model, steps=3)
    first = model.model.diffusion_model.transformer_blocks[0].img_mod[1]
    drawn(model, steps=3)
    assert model.model.diffusion_model.transformer_blocks[0].img_mod[1] is first
    drawn(model, steps=4)
    second = model.model.diffusion_model.transformer_blocks[0].img_mod[1]
    assert second is not first and second.weight.shape[1] > 3
