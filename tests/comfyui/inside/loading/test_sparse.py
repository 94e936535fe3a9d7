"""Files of `ppcl sparsify` in a real host: both loaders give what the engine gives, compressed or
not."""

from pathlib import Path

import pytest
import torch

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.settings.convert_settings import SparsifyConfig
from ppcl_engine.stages.convert.sparsify import sparsify

from ..forwards import relative_error

PLAIN = {
    "base": "none",
    "variant": "",
    "switchable": False,
    "weight_dtype": "fp32",
    "preset": "auto",
    "intervals": "",
    "legacy_text": False,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, models, teacher, bundle, calibration_of, make_model, save_model):
    folder = tmp_path_factory.mktemp("sparse")
    # told by shapes
    heads_of_32 = {
        "attention_head_dim": 32,
        "num_attention_heads": 1,
        "axes_dims_rope": [4, 14, 14],
    }
    whole = save_model(
        folder / "whole.safetensors", make_model(in_channels=64, out_channels=16, **heads_of_32)
    )

    def calibrated(model: Path) -> Path:
        calibration = calibration_of(model)
        for batch in calibration.batches:  # the host's models have 64 input channels
            batch["hidden_states"] = batch["hidden_states"].repeat(1, 1, 4)
            batch.pop("clean")
        save_calibration(folder / "calibration.safetensors", calibration)
        return folder / "calibration.safetensors"

    def make(variant: str, pattern: str):
        source = (
            {"path": whole}
            if variant == "whole"
            else {"path": bundle, "base": teacher, "variant": variant}
        )
        path = sparsify(
            SparsifyConfig(
                **source,
                run=folder,
                calibration=calibrated(source.get("base", whole)),
                pattern=pattern,
                device="cpu",
                name=f"sparse_{variant}_{pattern.replace(':', '_')}",
                score="wanda",
                granularity="layer",
                store="float32",
            )
        )
        return path.replace(models.diffusion_models / path.name)

    return make


@pytest.mark.parametrize("variant", ["whole", "smallest"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_both_loaders_give_the_engines_model(
    sparse, run_node, pack, velocity, engine_velocity, variant, pattern
):
    path = sparse(variant, pattern)
    expected = engine_velocity(path)
    model, said = run_node("PPCL_LoadModel", file=path.name, **PLAIN)
    assert said.splitlines()[-1].startswith("50 % of ") and said.endswith(f"are zero ({pattern})")
    assert relative_error(velocity(model), expected) < 1e-5
    weight = model.model.diffusion_model.transformer_blocks[0].attn.to_q.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    name = "full" if variant == "whole" else "pruned"
    assert pack("use.compare").column_name(model) == f"{name}, 50 % zero"
    (stock,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert (
        relative_error(velocity(stock), expected) < 1e-2 and torch.isfinite(velocity(stock)).all()
    )


@pytest.mark.parametrize("variant", ["whole", "smallest"])
def test_saved_by_the_host_it_is_dense(sparse, saved, load, opened, velocity, variant):
    """With its zeros, in all loaders."""
    model = load(sparse(variant, "2:4").name)
    path, expected = saved(model), velocity(model)
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < 1e-5, name
    weight = load(path.name).model.diffusion_model.transformer_blocks[0].attn.to_q.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
