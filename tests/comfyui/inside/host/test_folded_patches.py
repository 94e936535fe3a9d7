"""LoRA, ControlNet and offloading on folded modulations, by the host's own nodes: as on the
unfolded model."""

import comfy.hooks
import comfy.utils
import folder_paths
import pytest
import torch

from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..conftest import BOUND
from ..forwards import relative_error
from .test_stock_nodes import control  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("loose_bound")
LORA, STRENGTH = "modulations.safetensors", 0.7


@pytest.fixture(scope="module")
def changes(models, teacher) -> dict[str, torch.Tensor]:
    """A LoRA file for every modulation, by the names of their tensors what it adds at full
    strength."""
    generator, stored, by_key = torch.Generator().manual_seed(8), {}, {}
    for key in (k for k in TensorFile(teacher).keys() if "_mod.1.weight" in k):
        name, (out, into) = key.removesuffix(".weight"), TensorFile(teacher).shape(key)
        down = torch.randn(2, into, generator=generator) / into**0.5
        up, bias = (
            0.5 * torch.randn(out, 2, generator=generator),
            0.1 * torch.randn(out, generator=generator),
        )
        stored |= {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": up,
            f"{name}.diff_b": bias,
        }
        by_key |= {key: up @ down, f"{name}.bias": bias}
    write_tensors(models.loras / LORA, stored)
    return by_key


@pytest.fixture(scope="module")
def changed(run_node, changes):
    """A MODEL with that LoRA, by the host's own loader."""
    options = {"lora_name": LORA, "strength_model": STRENGTH}
    return lambda model: run_node("LoraLoaderModelOnly", model=model, **options)[0]


@pytest.mark.parametrize("variant", ["full", "smallest", "3-4,ffn_image:1"])
def test_a_lora_changes_modulations(whole, of_form, drawn, switched, changed, variant):
    """As in the unfolded model; the branch without it keeps its bits."""
    expected, without = (
        drawn(switched(model, variant=variant)) for model in (changed(whole), whole)
    )
    assert relative_error(without, expected) > 0.1
    table, basis = of_form("table"), of_form("basis")
    assert relative_error(drawn(switched(changed(table), variant=variant)), expected) < 1e-4
    assert torch.equal(drawn(switched(table, variant=variant)), without)
    error = relative_error(drawn(switched(basis, variant=variant)), without)
    assert relative_error(drawn(switched(changed(basis), variant=variant)), expected) < 2 * error
    assert 2 * error < relative_error(without, expected)


def test_a_lora_in_a_basis_is_exact(
    of_form, switched, changed, changes, velocity, engine_velocity, teacher, tmp_path
):
    """(W + dW) P: what the engine gives that folds weights which have the LoRA in them."""
    file, basis = TensorFile(teacher), switched(of_form("basis"), variant="full")
    merged = {
        n: t + STRENGTH * changes[n] if n in changes else t for n, t in file.read_all().items()
    }
    write_tensors(tmp_path / "merged.safetensors", merged, file.metadata)
    rank = basis.model.diffusion_model.time_text_embed.folding.directions.shape[1] - 1
    path = fold(
        FoldConfig(
            path=tmp_path / "merged.safetensors",
            form="basis",
            rank=rank,
            run=tmp_path,
            device="cpu",
        )
    )
    assert (
        relative_error(velocity(changed(basis)), engine_velocity(path))
        < 1e-4
        < 0.1
        < relative_error(velocity(basis), engine_velocity(path))
    )


def small(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


KINDS = {
    "loha": lambda out, into: {
        "hada_w1_a": small(out, 2),
        "hada_w1_b": small(2, into),
        "hada_w2_a": small(out, 3),
        "hada_w2_b": small(3, into),
    },
    "lokr": lambda out, into: {"lokr_w1": small(2, 2), "lokr_w2": small(out // 2, into // 2)},
    "whole": lambda out, into: {"diff": small(out, into)},
    "with alpha": lambda out, into: {
        "lora_down.weight": small(2, into),
        "lora_up.weight": small(out, 2),
        "alpha": torch.tensor(1.0),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(whole, of_form, drawn, run_node, models, kind):
    stored = {
        f"transformer.transformer_blocks.{block}.{name}.1.{leaf}": tensor
        for block in range(6)
        for name in ("img_mod", "txt_mod")
        for leaf, tensor in KINDS[kind](192, 32).items()
    }
    write_tensors(models.loras / "kind.safetensors", stored)
    options = {
        "clip": None,
        "lora_name": "kind.safetensors",
        "strength_model": -0.5,
        "strength_clip": 0.0,
    }
    expected, table, basis = (
        drawn(run_node("LoraLoader", model=model, **options)[0])
        for model in (whole, of_form("table"), of_form("basis"))
    )
    assert relative_error(drawn(whole), expected) > 1e-3
    assert relative_error(table, expected) < 1e-4 and relative_error(basis, expected) < BOUND


def test_a_new_schedule_with_a_lora_on(load, bundle, teacher, whole, drawn, changed):
    table = load(bundle.name, base=teacher.name, fold="table")
    for steps in (3, 5, 3):
        assert (
            relative_error(drawn(changed(table), steps=steps), drawn(changed(whole), steps=steps))
            < 1e-4
        )
        assert torch.equal(drawn(table, steps=steps), drawn(whole, steps=steps))


def test_lora_on_the_way_to_the_device(whole, of_form, drawn, changed, as_loaded):
    """Too little memory for the model: weights are patched when they are used."""
    expected = drawn(changed(whole))
    for form in ("table", "basis"):
        model = changed(of_form(form))
        loaded = drawn(model)
        model.partially_unload(torch.device("cpu"), 10**12)
        assert model.model.model_lowvram
        with as_loaded():
            assert relative_error(drawn(model), loaded) < 1e-4
        assert form == "basis" or relative_error(loaded, expected) < 1e-4


def test_a_lora_on_a_part_of_the_schedule(of_form, whole, drawn, run_node, inputs, changes):
    """The host's hooks patch while it samples."""
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", LORA))

    def hooked(model):
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=STRENGTH, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning([[inputs.text, {}]], hooks=hooks)
        latent = {"samples": torch.zeros_like(inputs.latents)}
        return run_node(
            "KSampler",
            model=model,
            seed=3,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=[[inputs.text, {}]],
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]

    expected = hooked(whole)
    assert relative_error(hooked(of_form("table")), expected) < 1e-4
    assert relative_error(drawn(of_form("table")), drawn(whole)) == 0


@pytest.mark.parametrize("kind", ["dora", "embedder", "merge"])
def test_changes_that_cannot_be_followed_are_one_line(
    of_form, whole, drawn, run_node, models, kind
):
    name = (
        "time_text_embed.timestep_embedder.linear_1"
        if kind == "embedder"
        else "transformer_blocks.0.img_mod.1"
    )
    into, out = (256, 32) if kind == "embedder" else (32, 192)
    stored = {
        f"{name}.lora_A.weight": torch.randn(2, into),
        f"{name}.lora_B.weight": torch.randn(out, 2),
    }
    if kind == "dora":
        stored[f"{name}.dora_scale"] = torch.ones(out, 1)
    write_tensors(models.loras / "other.safetensors", stored)
    if kind == "merge":
        (model,) = run_node("ModelMergeSimple", model1=of_form("table"), model2=whole, ratio=0.5)
    else:
        (model,) = run_node(
            "LoraLoaderModelOnly",
            model=of_form("table"),
            lora_name="other.safetensors",
            strength_model=1.0,
        )
    with pytest.raises(ValueError, match="set fold to off") as error:
        drawn(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
def test_a_control_net(control, whole, of_form, switched, run_node, inputs, variant):  # noqa: F811
    """Its residuals land as in the unfolded model."""
    positive = control()

    def controlled(model):
        latent = {"samples": torch.zeros_like(inputs.latents)}
        return run_node(
            "KSampler",
            model=switched(model, variant=variant),
            seed=3,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=[[inputs.text, {}]],
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]

    expected = controlled(whole)
    assert torch.equal(controlled(of_form("table")), expected)
    assert 0 < relative_error(controlled(of_form("basis")), expected) < BOUND


@pytest.mark.parametrize("form", ["table", "basis"])
def test_partly_on_the_device(of_form, drawn, form, as_loaded):
    model = of_form(form)
    expected = drawn(model)
    model.partially_unload(torch.device("cpu"), 10**12)
    assert model.model.model_lowvram
    with as_loaded():
        assert torch.equal(drawn(model), expected)


def test_nodes_that_show_a_model(
    load, bundle, teacher, run_node, of_form, switched, whole, changes
):
    words = {"table": "folded: a table of ", "basis": "folded: a basis of rank "}
    for form in ("table", "basis"):
        picture, text = run_node("PPCL_Info", model=switched(of_form(form), variant="small"))
        assert picture.shape[2] == 1800 and "4 of 6 blocks run" in text and words[form] in text
        reports = [
            run_node("PPCL_LoraReport", model=m, lora=LORA)[0] for m in (of_form(form), whole)
        ]
        assert reports[0] == reports[1] and "covers 14 of 24" in reports[0]
        alone, both = (
            load(bundle.name, base=teacher.name, variant="small", switchable=s, fold=form)
            for s in (False, True)
        )
        shares = [
            run_node("PPCL_Info", model=m)[1].splitlines()[0].split(" % of")[0].split()[-1]
            for m in (alone, both)
        ]
        assert abs(int(shares[0]) - int(shares[1])) <= 1  # a table in the host has a bias for LoRA
