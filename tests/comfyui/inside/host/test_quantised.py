"""Models in formats of few bits are read right, as far as this host reads them: a bundle's base,
whole pruned files and standalones, in our loader and in the host's. What is right: the same model
with the numbers that such a file stands for."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import pytest
import torch

from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ....tiny.released_models import KEPT, LISTS, TEACHER_BLOCKS, released_state
from ..conftest import BOUND
from ..forwards import relative_error
from ..quantised import EXACT, KINDS, NEAR, NEWER, READ, ROUNDED, Kind, numbers, stored

CASES = {
    "qwen_image": "qwen_image_wide",
    "flux1": "flux1_wide",
    "sd35": "sd35",
    "z_image": "z_image_wide",
}
# where all would take long
SOME = ("scaled fp8", "float8_e4m3fn in metadata", "int8 convrot", "nvfp4")
PLAIN = {"qwen_image": "3-4", "flux1": "9-10", "sd35": "4-5"}  # an interval without a correction


def on(*names: str):
    cases = [(name, CASES[name]) for name in names]
    return pytest.mark.parametrize(("architecture", "host_case"), cases, ids=names, indirect=True)


def kinds(*names: str):
    return pytest.mark.parametrize("name", [name for name in names if name in READ])


@pytest.fixture(scope="module")
def written(models):
    """Tensors in this format, and their numbers in full precision: names of two files, each written
    once."""

    def write(
        tensors: dict, name: str, file: str, about: dict | None = None, prefix: str = ""
    ) -> tuple[str, str]:
        paths = [
            models.diffusion_models / f"{file} {name}{ending}.safetensors"
            for ending in ("", " exact")
        ]
        if not paths[0].exists():
            found, exact, metadata = stored(tensors, KINDS[name])
            write_tensors(
                paths[0], {prefix + n: t for n, t in found.items()}, {**(about or {}), **metadata}
            )
            write_tensors(paths[1], {prefix + n: t for n, t in exact.items()}, about)
        return paths[0].name, paths[1].name

    return write


@pytest.fixture(scope="module")
def base_of(written, host_tensors, teacher, host_case):
    return lambda name, **more: written(
        host_tensors, name, host_case.file, TensorFile(teacher).metadata, **more
    )


def check(model, expected, velocity, kind: Kind, numbers_near: float, near: float) -> None:
    theirs, ours = numbers(expected), numbers(model)
    assert ours.keys() == theirs.keys()
    assert max(relative_error(tensor, theirs[name]) for name, tensor in ours.items()) < numbers_near
    assert relative_error(velocity(model), velocity(expected)) < kind.far(near)


@pytest.mark.parametrize("name", READ)
@on("flux1")
def test_a_base(load, velocity, bundle, base_of, name, caplog):
    """The base of a switchable model, and of one that holds a single variant, whose maps are cut."""
    (base, exact), kind = base_of(name), KINDS[name]
    for variant, switchable in (
        ("full", True),
        ("smallest", False),
        *[("smallest", True)] * (name in SOME),
    ):
        expected = load(bundle.name, base=exact, variant=variant, switchable=switchable)
        caplog.clear()
        model = load(
            bundle.name, base=base, variant=variant, switchable=switchable, weight_dtype="default"
        )
        assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
        near = ROUNDED if kind.old else NEAR
        numbers_near = near if kind.old or not switchable else EXACT
        check(model, expected, velocity, kind, numbers_near, EXACT if variant == "full" else near)


@kinds(*SOME)
@on("qwen_image", "sd35", "z_image")
def test_a_base_of_other_architectures(load, velocity, bundle, base_of, name):
    (base, exact), kind = base_of(name), KINDS[name]
    expected = load(bundle.name, base=exact, variant="smallest", switchable=False)
    model = load(
        bundle.name, base=base, variant="smallest", switchable=False, weight_dtype="default"
    )
    near = ROUNDED if kind.old else NEAR
    check(model, expected, velocity, kind, near, near)


@kinds("float8_e4m3fn", "float8_e4m3fn in metadata", "nvfp4")
@on("flux1")
def test_a_base_by_diffusers_names(load, velocity, bundle, written, teacher, name):
    """Whose pieces of one map have scales of their own."""
    base, exact = written(TensorFile(teacher).read_all(), name, "flux by diffusers")
    expected = load(bundle.name, base=exact, variant="smallest", switchable=False)
    model = load(
        bundle.name, base=base, variant="smallest", switchable=False, weight_dtype="default"
    )
    check(model, expected, velocity, KINDS[name], NEAR, NEAR)


@kinds("float8_e4m3fn", "float8_e4m3fn in metadata", "int8")
@on("sd35")
def test_a_checkpoint_as_base(
    load, velocity, bundle, base_of, written, host_tensors, teacher, name
):
    base, _ = written(
        host_tensors, name, "sd35 checkpoint", TensorFile(teacher).metadata, prefix=COMFYUI_PREFIX
    )
    expected = load(bundle.name, base=base_of(name)[1], variant="small")
    model = load(bundle.name, base=base, variant="small", weight_dtype="default")
    check(model, expected, velocity, KINDS[name], EXACT, NEAR)


@kinds("scaled fp8", "float8_e4m3fn", "nvfp4")
@on("flux1")
def test_a_checkpoint_in_the_hosts_loader(load, velocity, pruned, written, models, name):
    file, exact = written(pruned["ppcl"][0], name, "flux checkpoint", prefix=COMFYUI_PREFIX)
    tensors = TensorFile(models.diffusion_models / file).read_all()
    with torch.inference_mode():  # as in a node
        model, *_ = comfy.sd.load_state_dict_guess_config(
            tensors, output_vae=False, output_clip=False
        )
    check(model, load(exact), velocity, KINDS[name], EXACT, EXACT)


@kinds("scaled fp8", "float8_e4m3fn")
@on("flux1")
def test_scales_of_inputs(load, velocity, bundle, host_tensors, teacher, models, name):
    """Which matter where products are in few bits too."""
    found, _, _ = stored(host_tensors, KINDS[name])
    leaf = "scale_input" if KINDS[name].old else "input_scale"
    matrices = [n for n, t in found.items() if n.endswith(".weight") and t.dtype.itemsize == 1]
    scales = {n.removesuffix("weight") + leaf: torch.tensor(0.5) for n in matrices}
    velocities = []
    for file, tensors in (("plain", found), ("with inputs", found | scales)):
        path = models.diffusion_models / f"flux {name} {file}.safetensors"
        write_tensors(path, tensors, TensorFile(teacher).metadata)
        model = load(
            bundle.name,
            base=path.name,
            variant="smallest",
            switchable=False,
            weight_dtype="default",
        )
        velocities.append(velocity(model))
    assert torch.equal(*velocities)


@pytest.fixture(scope="module")
def pruned(exported, tmp_path_factory, architecture):
    """Whole pruned files: of depth alone, counted anew; of depth and width, as our loader has
    them."""
    folder = tmp_path_factory.mktemp("pruned")
    files = {
        "comfyui": exported(folder, "comfyui", "depth", PLAIN[architecture.name]),
        "ppcl": exported(folder, "ppcl", "width", "smallest"),
    }
    return {
        layout: (TensorFile(path).read_all(), TensorFile(path).metadata)
        for layout, path in files.items()
    }


@pytest.mark.parametrize("name", READ)
@on("flux1")
def test_a_pruned_file(load, run_node, velocity, pruned, written, name):
    """In our loader and in the host's own."""
    for layout in pruned if name in SOME else ("ppcl",):
        file, exact = written(pruned[layout][0], name, f"flux {layout}", pruned[layout][1])
        (stock,), expected = (
            run_node("UNETLoader", unet_name=file, weight_dtype="default"),
            load(exact),
        )
        for model in (load(file, weight_dtype="default"), stock):
            check(model, expected, velocity, KINDS[name], EXACT, EXACT)


@kinds(*SOME)
@on("qwen_image")
def test_a_released_model_with_old_text_projections(
    load, run_node, velocity, make_model, host_case, written, name
):
    state = released_state(make_model(num_layers=TEACHER_BLOCKS, **host_case.channels), KEPT, LISTS)
    file, exact = written(state, name, "released")
    for legacy in (False, True):
        model, expected = (
            load(f, legacy_text=legacy, weight_dtype="default") for f in (file, exact)
        )
        near = ROUNDED if KINDS[name].old and legacy else NEAR
        check(model, expected, velocity, KINDS[name], near, near)
    (model,) = run_node("UNETLoader", unet_name=file, weight_dtype="default")
    check(model, load(exact), velocity, KINDS[name], EXACT, EXACT)


@pytest.fixture(scope="module")
def lora(models, host_case, host_tensors):
    """On every matrix of the blocks."""
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, tensor in host_tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2 and "blocks." in name:
            module, (rows, columns) = (
                f"diffusion_model.{name.removesuffix('.weight')}",
                tensor.shape,
            )
            tensors[f"{module}.lora_A.weight"] = (
                torch.randn(2, columns, generator=generator) / columns**0.5
            )
            tensors[f"{module}.lora_B.weight"] = 0.2 * torch.randn(rows, 2, generator=generator)
    write_tensors(models.loras / f"{host_case.file}_all.safetensors", tensors)
    return f"{host_case.file}_all.safetensors"


@kinds("scaled fp8", "float8_e4m3fn in metadata", "int8 convrot", "mxfp8")
@on("flux1")
def test_a_lora_on_top(load, run_node, velocity, bundle, base_of, lora, name, as_loaded):
    """Put into the weights, which are then rounded again, and added on their way to the device."""
    (base, exact), kind = base_of(name), KINDS[name]
    for switchable in (False, True) if name == "int8 convrot" else (False,):
        options = {"variant": "smallest", "switchable": switchable}
        bare = load(bundle.name, base=exact, **options)
        patched, model = (
            run_node("LoraLoaderModelOnly", model=quantised, lora_name=lora, strength_model=1.0)[0]
            for quantised in (bare, load(bundle.name, base=base, **options, weight_dtype="default"))
        )
        expected = velocity(patched)
        changed = relative_error(velocity(bare), expected)
        assert relative_error(velocity(model), expected) < min(0.2, changed / 2)
        comfy.model_management.unload_all_models()
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
        with as_loaded():
            quantised = velocity(model)
        model.unpatch_model(torch.device("cpu"))
        assert relative_error(quantised, expected) < kind.far(
            NEAR if NEWER and not kind.old else ROUNDED
        )


@kinds(*SOME)
@on("qwen_image")
def test_folded(load, bundle, base_of, drawn, loose_bound, name):
    """A table has the bits of the unfolded model, on the host's own quantised maps."""
    options = {
        "base": base_of(name)[0],
        "variant": "smallest",
        "switchable": False,
        "weight_dtype": "default",
    }
    expected = drawn(load(bundle.name, **options))
    assert torch.equal(drawn(load(bundle.name, **options, fold="table")), expected)
    assert relative_error(drawn(load(bundle.name, **options, fold="basis")), expected) < BOUND


@kinds("float8_e4m3fn", "nvfp4")
@on("sd35")
def test_what_nodes_say_of_it(load, bundle, base_of, pack, name):
    """Sizes are of numbers, not of what is packed; bytes are those that are there, scales too."""
    base, exact = base_of(name)
    model, expected = (
        load(bundle.name, base=base, weight_dtype="default"),
        load(bundle.name, base=exact),
    )
    sizes = pack("host.branch").sizes
    assert sizes(model)[0] == sizes(expected)[0] and sizes(model)[1] < 0.65 * sizes(expected)[1]
    whole = load(base, weight_dtype="default")
    shapes = {
        n: tuple(t.shape)
        for n, t in pack("host.switching").tensors_in(whole.model.diffusion_model).items()
    }
    full = pack("host.switching").tensors_in(load(exact).model.diffusion_model)
    assert shapes == {n: tuple(t.shape) for n, t in full.items()}
    weights = Weights(pack("paths").model_path(exact))
    pack("make.record_calibration").check_same_model(whole, weights)


@kinds("float8_e4m3fn", "nvfp4")
@on("qwen_image")
def test_a_model_of_the_hosts_own(load, base_of, pack, name, monkeypatch):
    """The engine knows nothing of such a model but what is loaded. A real one is 3,072 wide; this one
    stands for it."""
    configs = []
    for file in base_of(name):
        model = load(file, weight_dtype="default")
        monkeypatch.delattr(model.model.diffusion_model, "ppcl")
        configs.append(pack("host.branch").known(model)[1])
    assert configs[0] == configs[1]
