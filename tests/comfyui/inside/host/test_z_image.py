"""Z-Image in the host beyond parity: LoRA by both kinds of names on every variant, recording, and a
renumbered file of students without corrections, which a stock host takes for its own."""

import comfy.model_detection
import comfy.supported_models
import comfyui_version
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.system.tensor_files import write_tensors

from ..forwards import engine_forward, relative_error, velocity_of
from ..sampling.test_record import LIMITS, draw, engine_velocity
from .stock_models import stock_models
from .test_published_sizes import meta

pytestmark = pytest.mark.parametrize("architecture", ["z_image"], indirect=True)
VARIANTS = ("full", "1-2", "1-2,ffn_joint:1", "smallest")
RANK, ROWS = 3, 2
OLDEST = comfyui_version.__version__ == "0.3.75"  # it knows no other prefix of such a LoRA
QUERY, FUSED = "attention.to_q.weight", "attention.qkv"
SAMPLING = {"steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def changes(architecture, teacher, fused: bool) -> tuple[dict, dict]:
    """(a LoRA file's tensors, the change of every matrix by diffusers' names): of all maps of the
    blocks and refiners, q, k and v in one or each by itself."""
    shapes = expected_shapes(architecture, Weights(teacher).config)
    generator, stored, by_key = torch.Generator().manual_seed(2), {}, {}

    def change(name: str, out: int, into: int) -> torch.Tensor:
        down, up = (torch.randn(*s, generator=generator) for s in ((RANK, into), (out, RANK)))
        up *= 0.3 / into**0.5
        stored.update({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
        return up @ down

    for key in (key for key in shapes if ("layers." in key or "refiner." in key)):
        (rows, *columns), module = shapes[key], key.removesuffix(".weight")
        if not columns or (fused and ".to_k." in key) or (fused and ".to_v." in key):
            continue
        if fused and key.endswith(QUERY):
            name = f"diffusion_model.{module.replace('attention.to_q', FUSED)}"
            for letter, part in zip("qkv", change(name, 3 * rows, rows).chunk(3), strict=True):
                by_key[key.replace("to_q", f"to_{letter}")] = part
            continue
        name = architecture.to_comfyui(key).name.removesuffix(".weight") if fused else module
        prefix = "diffusion_model" if fused or OLDEST else "transformer"
        by_key[key] = change(f"{prefix}.{name}", rows, *columns)
    return stored, by_key


def with_changes(model, by_key: dict) -> torch.nn.Module:
    """A cut modulation keeps its first half; what a projection replaced takes no LoRA."""
    weights = dict(model.named_parameters())
    for key, change in by_key.items():
        if key in weights:
            weights[key].add_(change[: len(weights[key])])
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["the host's names", "diffusers'"])
def test_lora_on_every_kind_of_variant(
    whole, switched, run_node, velocity, models, bundle, teacher, architecture, inputs, fused
):
    stored, by_key = changes(architecture, teacher, fused)
    name = f"z_image_{fused}.safetensors"
    write_tensors(models.loras / name, stored)
    for variant in VARIANTS:
        model = switched(whole, variant=variant)
        (patched,) = run_node(
            "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0
        )
        engine = with_changes(open_model(bundle, variant, teacher), by_key)
        ours = velocity(patched)
        assert relative_error(ours, engine_forward(architecture, engine, inputs)) < 1e-4, variant
        assert relative_error(ours, velocity(model)) > 0.05, variant


def test_what_is_recorded_is_what_the_host_did(run_node, pack, load, teacher, tmp_path):
    """Texts of two lengths lie in one batch, the shorter padded and masked."""
    model, path = load(teacher.name), tmp_path / "calibration.safetensors"
    text = torch.randn(ROWS, 40, 24, generator=torch.Generator().manual_seed(8))
    given = {
        "positive": [[text, {}]],
        "negative": [[text[:1, :5], {}]],
        "latent_image": {"samples": torch.zeros(ROWS, 16, 8, 12)},
        **SAMPLING,
    }
    limits = pack("sampling.recording").Limits(**{**LIMITS, "samples": 100})
    recorded = pack("sampling.recorder").Recorder(Weights(teacher), path, limits).around(model)
    returned = []

    def see(module, arguments, named, result):
        x, t = (tensor.clone() for tensor in arguments[:2])
        returned.append((x, t, named["context"].clone(), result.clone()))

    seen = model.model.diffusion_model.register_forward_hook(see, with_kwargs=True)
    draw(run_node, recorded, given)
    seen.remove()
    weights = Weights(teacher)
    engine, architecture = Teacher(weights, torch.float32, "cpu", False), weights.architecture
    timestep, compared = model.model.model_sampling.timestep, 0
    for row in load_calibration(path).all_inputs():
        with torch.no_grad():
            velocity = engine_velocity(engine, row)
        for i in range(len(velocity)):
            real = row["encoder_hidden_states_mask"][i]
            x = architecture.unpack(row["hidden_states"][i : i + 1], row["grid"])[0]
            texts = row["encoder_hidden_states"][i][real]
            host = velocity_of(returned, x, timestep(row["timestep"][i]), texts)
            expected = architecture.unpack(velocity[i : i + 1], row["grid"])[0]
            assert relative_error(host, expected) < 1e-4
            compared += 1
    assert compared == ROWS * LIMITS["each_picture"]


def test_a_stock_host_takes_a_renumbered_file_for_its_own(architecture, monkeypatch):
    engine = architecture_named("z_image")
    config = engine.with_blocks(engine.model_configs["z_image"], range(24))
    tensors = meta(engine, expected_shapes(engine, config))
    with monkeypatch.context() as patch:
        patch.setattr(comfy.supported_models, "models", stock_models())
        found = comfy.model_detection.model_config_from_unet(tensors, "")
    assert type(found).__name__ == "ZImage"
    assert found.unet_config["n_layers"] == 24 and found.unet_config["pad_tokens_multiple"] == 32
