"""What the viewing nodes say of pruned models: layer maps, LoRA coverage, pictures side by side."""

import pytest
import torch

from ppcl_engine.system.numbers import count_text
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ....tiny.released_models import (
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    released_state,
    write_folder,
)

SAMPLING = {"seed": 1, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


@pytest.fixture(scope="module")
def small_lora(models):
    """Two maps of every block, by the names of a training tool, and one of another model."""
    stored = {}
    for module in [
        f"transformer_blocks.{b}.{p}" for b in range(6) for p in ("attn.to_q", "img_mod.1")
    ] + ["joint.0"]:
        stored |= {
            f"{module}.lora_A.weight": torch.zeros(2, 32),
            f"{module}.lora_B.weight": torch.zeros(32, 2),
        }
    write_tensors(
        models.loras / "small.safetensors", {f"diffusion_model.{n}": t for n, t in stored.items()}
    )
    return "small.safetensors"


def test_info(run_node, whole, switched):
    picture, text = run_node("PPCL_Info", model=switched(whole, variant="small"))
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.shape[2] == 1800
    assert 0 <= picture.min() < 0.5 < picture.max() <= 1
    lines = text.splitlines()
    assert lines[0].startswith("small: ") and "% of" in lines[0]
    assert lines[1] == "4 of 6 blocks run; 0 parts are projected"


def test_info_of_single_files(run_node, load, bundle, teacher, pack):
    """A variant loaded alone, and the plain teacher: the same share of the whole as in the
    switchable model."""
    for variant, blocks in (("small", "4 of 6"), ("smallest", "4 of 6")):
        alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
        both = load(bundle.name, base=teacher.name, variant=variant)
        texts = [run_node("PPCL_Info", model=model)[1] for model in (alone, both)]
        shares = [text.splitlines()[0].split(": ")[1].split(";")[0] for text in texts]
        assert shares[0] == shares[1] and f"{blocks} blocks run" in texts[0]
        assert pack("host.branch").name_of(alone) == "pruned"
    assert "100 % of" in run_node("PPCL_Info", model=load(teacher.name))[1]
    assert pack("host.branch").name_of(load(teacher.name)) == "full"


@pytest.mark.parametrize(
    "preset, blocks", [("by intervals", TEACHER_BLOCKS), ("as numbered", len(KEPT))]
)
def test_info_of_a_released_model(run_node, load, models, make_model, model_config, preset, blocks):
    sizes = {
        "in_channels": 64,
        "out_channels": 16,
        "attention_head_dim": 32,
        "axes_dims_rope": [4, 14, 14],
    }
    big = make_model(num_layers=TEACHER_BLOCKS, **sizes)
    config = model_config(make_model(num_layers=len(KEPT), **sizes))
    write_folder(models.ppcl / "seen", released_state(big, KEPT, LISTS), config, LISTS, "sharded")
    model = load("seen/", preset=preset, intervals=INTERVALS)
    picture, text = run_node("PPCL_Info", model=model)
    full = sum(p.numel() for p in make_model(num_layers=blocks, **sizes).parameters())
    assert f"% of {count_text(full)}; " in text and f"6 of {blocks} blocks run; 6 parts are" in text
    assert picture.shape[2] == 1800


def test_damage_is_measured_or_added_up(pack, whole, switched):
    from dataclasses import replace

    branch = pack("host.branch")
    plan = whole.model.diffusion_model.ppcl.plan
    scored = plan.with_parts(intervals=tuple(replace(i, score=0.25) for i in plan.intervals))
    small = plan.variant("small")
    assert (
        branch.damage_text(scored, small)
        == "small: velocity error about 0.500 (the sum of its parts)"
    )
    measured = scored.with_parts(variants=(replace(small, damage=0.3),))
    assert branch.damage_text(measured, small) == "small: velocity error 0.300"
    assert branch.damage_text(plan, small) == ""


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("full", "covers 12 of 13 modules; 1 are not of this model"),
        ("3-4", "covers 10 of 13 modules; 2 belong to removed blocks; 1 are not of this model"),
        ("small", "covers 8 of 13 modules; 4 belong to removed blocks; 1 are not of this model"),
    ],
)
@pytest.mark.parametrize("switchable", [True, False])
def test_lora_report(run_node, load, small_lora, bundle, teacher, variant, expected, switchable):
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)
    text, _ = run_node("PPCL_LoraReport", model=model, lora=small_lora)
    first, *names = text.splitlines()
    assert first.endswith(expected)
    assert "not of this model: diffusion_model.joint.0" in names


def test_lora_report_on_projected_parts(run_node, load, bundle, teacher, models):
    """As many modules are called reached as the host changes weights."""
    names = [
        k.removesuffix(".weight")
        for k in TensorFile(teacher).keys()
        if k.startswith("transformer_blocks.")
    ]
    names = [n for n in names if not n.endswith(".bias") and "norm" not in n]
    stored = {f"transformer.{n}.lora_down.weight": torch.zeros(2, 1) for n in names}
    stored |= {f"transformer.{n}.lora_up.weight": torch.zeros(1, 2) for n in names}
    write_tensors(
        models.loras / "every.safetensors",
        {k.replace("transformer.", "diffusion_model.", 1): t for k, t in stored.items()},
    )
    for variant in ("smallest", "1-2,text:3-4", "ffn_text:0"):
        model = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
        text, _ = run_node("PPCL_LoraReport", model=model, lora="every.safetensors")
        (loaded,) = run_node(
            "LoraLoaderModelOnly", model=model, lora_name="every.safetensors", strength_model=1.0
        )
        assert f"covers {len(loaded.patches)} of {len(names)} modules" in text, variant
        both = load(bundle.name, base=teacher.name, variant=variant)
        assert (
            run_node("PPCL_LoraReport", model=both, lora="every.safetensors")[0].split(": ", 1)[1]
            == text.split(": ", 1)[1]
        )
        assert "belong to projected parts" in text


def test_lora_that_is_not_there(run_node, whole):
    with pytest.raises(ValueError, match="'../secret' is not in models/loras"):
        run_node("PPCL_LoraReport", model=whole, lora="../secret")


def test_compare(run_node, whole, switched, inputs, pack):
    """Seconds are those of the sampler's steps; a MODEL that nothing was drawn with has none."""
    models = [switched(whole, variant=name) for name in ("full", "small", "smallest")]
    conditioning = {"positive": [[inputs.text, {}]], "negative": [[inputs.text[:, ::2], {}]]}
    latent = {"samples": torch.zeros(1, 16, 1, 8, 12)}
    for model in models[:2]:
        run_node("KSampler", model=model, steps=4, latent_image=latent, **conditioning, **SAMPLING)
    seconds = [pack("sampling.step_timer").seconds_a_step(model) for model in models]
    assert seconds[0] > 0 and seconds[1] > 0 and seconds[2] is None
    given = {f"model_{i}": m for i, m in enumerate(models, 1)} | {
        f"image_{i}": torch.rand(2, 8, 8, 3) for i in (1, 2, 3)
    }
    (picture,) = run_node("PPCL_Compare", **given)
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.shape[2] > 3 * 300


def test_compare_wants_pairs(run_node, whole):
    with pytest.raises(ValueError, match="model_2 and image_2 belong together"):
        run_node("PPCL_Compare", model_1=whole, image_1=torch.rand(1, 8, 8, 3), model_2=whole)
