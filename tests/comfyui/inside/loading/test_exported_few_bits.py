"""Files in ComfyUI's formats of few bits, as `ppcl export` writes them: the host's own loader and
ours read the numbers that the engine reads, and a bundle's students keep their format."""

from __future__ import annotations

from functools import cache, partial
from itertools import cycle

import comfy.quant_ops
import pytest
import torch

from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.storing import MIXED, is_block_matrix
from ppcl_engine.models.tensor_sources import Source, comfyui_sources, write_sources
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.few_bits import STORES
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..forwards import relative_error
from ..quantised import INPUTS, KINDS, KNOWN, numbers, stored

READ = [store for store, kind in STORES.items() if kind.format in KNOWN]
BY_ROW = [store for store in ("int8", "int8_convrot", "w4a4") if store in READ]
LORA = {"strength_model": 1.0, "lora_name": "few_bits.safetensors"}
NEAR = 1e-3
# what the host does in 16 bits, beside rounding inputs
HALF = 1e-2


def on(*cases: str):
    names = {"qwen_image": "qwen_image_wide", "flux1": "flux1_wide"}
    return pytest.mark.parametrize(
        ("architecture", "host_case"), [(c, names[c]) for c in cases], ids=cases, indirect=True
    )


@pytest.fixture(scope="module")
def written(models, teacher, run_folder, bundle):
    """(layout, store, variant) -> the file among the host's models."""
    plain = next(i.name for i in Bundle(bundle).plan.intervals if i.correction == "none")

    @cache
    def make(layout: str, store: str, variant: str = plain):
        config = ExportConfig(
            model=teacher,
            run=run_folder,
            layout=layout,
            store=store,
            variant=variant,
            name=f"{teacher.stem}_{layout}_{store}_{variant}",
        )
        if store == MIXED:
            return mixed(make(layout, "bfloat16", variant))
        folder = models.diffusion_models if layout == "comfyui" else models.ppcl
        path = export(config)
        return path.replace(folder / path.name)

    return make


def mixed(path):
    """The same tensors with the formats in turn, in a file beside it."""
    file, extra = TensorFile(path), {}
    sources = {n: Source(file.shape(n), partial(file.read, n)) for n in file.keys()}
    for name in [n for n in sources if not file.dtype(n).is_floating_point]:
        extra[name] = sources.pop(name).read()
    matrices = [n for n, s in sources.items() if is_block_matrix(n, s.shape)]
    stores = dict(zip(matrices, cycle(("bfloat16", *READ)), strict=False))
    target = path.with_stem(f"{path.stem}_mixed")
    write_sources(target, sources, "bfloat16", file.metadata, extra, stores)
    return target


@pytest.fixture
def in_full(models, load, architecture):
    """The MODEL of the numbers that the engine reads from a file for stock hosts."""
    target = models.diffusion_models / "in_full.safetensors"

    def make(path):
        state = open_model(path).state_dict()
        sources = {n: Source(tuple(t.shape), lambda t=t: t) for n, t in state.items()}
        named = comfyui_sources(architecture, sources)
        write_tensors(target, {n: s.read() for n, s in named.items()}, TensorFile(path).metadata)
        return load(target.name, variant="", switchable=False, weight_dtype="default")

    yield make
    target.unlink(missing_ok=True)


def loaded_clean(caplog, make):
    caplog.clear()
    model = make()
    assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
    return model


@pytest.mark.parametrize("store", [*READ, *([MIXED] if READ else [])])
@on("qwen_image", "flux1")
def test_the_host_s_loader_and_ours(
    written, load, run_node, velocity, engine_velocity, in_full, store, caplog
):
    """Formats whose inputs the host rounds too differ by that; the numbers of the weights do not."""
    path = written("comfyui", store)
    expected = in_full(path)
    exact = numbers(expected)
    assert relative_error(velocity(expected), engine_velocity(path)) < NEAR
    rounding = READ if store == MIXED else (store,)
    near = max(NEAR, *(INPUTS.get(STORES[name].format, 0) for name in rounding))
    stock = partial(run_node, "UNETLoader", unet_name=path.name, weight_dtype="default")
    ours = partial(load, path.name, variant="", switchable=False, weight_dtype="default")
    for make in (lambda: stock()[0], ours):
        model = loaded_clean(caplog, make)
        theirs = numbers(model)
        assert theirs.keys() == exact.keys()
        assert max(relative_error(t, exact[name]) for name, t in theirs.items()) < NEAR
        assert relative_error(velocity(model), velocity(expected)) < near


@pytest.mark.parametrize("store", READ[:2])
@on("qwen_image")
def test_a_lora_on_top(written, load, run_node, velocity, in_full, models, store):
    path, generator = written("comfyui", store), torch.Generator().manual_seed(3)
    name, lora = "transformer_blocks.1.attn.to_q", {}
    width = TensorFile(path).shape(f"{name}.bias")[0]
    for leaf, shape in (("lora_A", (4, width)), ("lora_B", (width, 4))):
        lora[f"{name}.{leaf}.weight"] = torch.randn(shape, generator=generator) / 2
    write_tensors(models.loras / LORA["lora_name"], lora)
    model = load(path.name, variant="", switchable=False, weight_dtype="default")
    (ours,) = run_node("LoraLoaderModelOnly", model=model, **LORA)
    (theirs,) = run_node("LoraLoaderModelOnly", model=in_full(path), **LORA)
    difference = relative_error(velocity(ours), velocity(model))
    assert relative_error(velocity(ours), velocity(theirs)) < 0.5 * difference


def not_quantised(model) -> list[str]:
    """The matrices in blocks that are in 16 bits or more, without corrections."""
    state = model.model.diffusion_model.named_modules()
    matrices = {n: m.weight for n, m in state if is_block_matrix(f"{n}.weight", shape_of(m))}
    kept = comfy.quant_ops.QuantizedTensor
    return [name for name, weight in matrices.items() if not isinstance(weight.data, kept)]


def shape_of(module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


@pytest.mark.parametrize("store", BY_ROW)
@on("qwen_image", "flux1")
def test_a_variant_of_a_bundle_is_quantised_throughout(
    written, load, velocity, engine_velocity, architecture, store, caplog
):
    """On a base in the same format, students and projections keep it; fused maps too, but for FLUX'
    widest in four bits."""
    joined = ("linear1",) if (architecture.name, store) == ("flux1", "w4a4") else ()
    path, base = written("bundle", store), written("comfyui", store, "full")
    expected = engine_velocity(path, "small", base)
    for switchable in (False, True):
        options = {"variant": "small", "switchable": switchable, "weight_dtype": "default"}
        model = loaded_clean(caplog, partial(load, path.name, base=base.name, **options))
        if not switchable:
            assert [name for name in not_quantised(model) if not name.endswith(joined)] == []
        near = max(HALF, INPUTS[STORES[store].format])
        assert relative_error(velocity(model), expected) < near


@pytest.mark.parametrize("store", READ)
@on("qwen_image")
def test_a_standalone_with_corrections_and_projections(
    written, load, velocity, engine_velocity, store, caplog
):
    path = written("ppcl", store, "smallest")
    model = loaded_clean(caplog, lambda: load(path.name, weight_dtype="default"))
    near = max(HALF, INPUTS.get(STORES[store].format, 0))
    assert relative_error(velocity(model), engine_velocity(path)) < near


@pytest.mark.skipif("int8_tensorwise" in KNOWN, reason="this ComfyUI knows the format")
@on("qwen_image")
def test_students_in_a_format_that_the_host_does_not_know(load, bundle, teacher, models):
    file = TensorFile(bundle)
    found, _, _ = stored(file.read_all(), KINDS["int8 by row"])
    write_tensors(models.ppcl / "few.ppcl.safetensors", found, file.metadata)
    with pytest.raises(
        ValueError, match="int8_tensorwise, which ComfyUI .* does not read"
    ) as error:
        load("few.ppcl.safetensors", base=teacher.name, variant="small")
    assert "\n" not in str(error.value)
