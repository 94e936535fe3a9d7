"""Krea 2 in the host beyond parity: LoRA by both kinds of names on every variant, recording, and a
renumbered file of students without corrections, which a stock host takes for its own."""

from importlib.util import find_spec

import comfy.model_detection
import comfy.supported_models
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
from .test_z_image import RANK, ROWS, SAMPLING, VARIANTS, with_changes

if not find_spec("comfy.ldm.krea2"):
    pytest.skip("this ComfyUI does not know Krea 2", allow_module_level=True)
pytestmark = pytest.mark.parametrize("architecture", ["krea2"], indirect=True)


def changes(architecture, teacher, names: str) -> tuple[dict, dict]:
    """(a LoRA file's tensors, the change of every matrix by diffusers' names): of all maps of the
    blocks and of the text's."""
    shapes = expected_shapes(architecture, Weights(teacher).config)
    generator, stored, by_key = torch.Generator().manual_seed(2), {}, {}
    for key in (key for key in shapes if "blocks." in key and key.endswith(".weight")):
        out, *into = shapes[key]
        if not into:
            continue
        theirs = architecture.to_comfyui(key).name
        name = f"diffusion_model.{theirs}" if names == "host" else f"transformer.{key}"
        down, up = (torch.randn(*s, generator=generator) for s in ((RANK, *into), (out, RANK)))
        up *= 0.3 / into[0] ** 0.5
        module = name.removesuffix(".weight")
        stored |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        by_key[key] = up @ down
    return stored, by_key


@pytest.mark.parametrize("names", ["host", "diffusers"])
def test_lora_on_every_kind_of_variant(
    whole, switched, run_node, velocity, models, bundle, teacher, architecture, inputs, names
):
    stored, by_key = changes(architecture, teacher, names)
    name = f"krea2_{names}.safetensors"
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
    weights, path = Weights(teacher), tmp_path / "calibration.safetensors"
    text = torch.randn(ROWS, 9, 24, generator=torch.Generator().manual_seed(8))
    given = {
        "positive": [[text, {}]],
        "negative": [[text[:1, :5], {}]],
        "latent_image": {"samples": torch.zeros(ROWS, 16, 1, 8, 12)},
        **SAMPLING,
    }
    limits = pack("sampling.recording").Limits(**{**LIMITS, "samples": 100})
    model, returned = load(teacher.name), []
    recorded = pack("sampling.recorder").Recorder(weights, path, limits).around(model)

    def see(module, arguments, named, result):
        x, t = (tensor.clone() for tensor in arguments[:2])
        returned.append((x[:, :, 0], t, named["context"].clone(), result[:, :, 0].clone()))

    seen = model.model.diffusion_model.register_forward_hook(see, with_kwargs=True)
    draw(run_node, recorded, given)
    seen.remove()
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


def test_recording_reference_pictures_is_one_line(run_node, pack, load, teacher, tmp_path):
    limits = pack("sampling.recording").Limits(**LIMITS)
    recorder = pack("sampling.recorder").Recorder(Weights(teacher), tmp_path / "c", limits)
    reference = {"reference_latents": [torch.zeros(1, 16, 1, 8, 12)]}
    text = torch.randn(1, 9, 24)
    given = {
        "positive": [[text, reference]],
        "negative": [[text, reference]],
        "latent_image": {"samples": torch.zeros(1, 16, 1, 8, 12)},
        **SAMPLING,
    }
    with pytest.raises(ValueError, match="calibrations of krea2 hold no reference pictures"):
        draw(run_node, recorder.around(load(teacher.name)), given)


def test_a_stock_host_takes_a_renumbered_file_for_its_own(architecture, monkeypatch):
    engine = architecture_named("krea2")
    config = engine.with_blocks(engine.model_configs["krea2"], range(22))
    tensors = meta(engine, expected_shapes(engine, config))
    with monkeypatch.context() as patch:
        patch.setattr(comfy.supported_models, "models", stock_models())
        found = comfy.model_detection.model_config_from_unet(tensors, "")
    assert type(found).__name__ == "Krea2"
    wanted = {"layers": 22, "heads": 48, "kvheads": 12, "txtlayers": 12, "txtdim": 2560}
    assert wanted.items() <= found.unet_config.items()
    found.set_inference_dtype(torch.bfloat16, None)
    built = found.get_model(tensors, "", device=torch.device("meta")).diffusion_model
    assert {n: t.shape for n, t in built.state_dict().items()} == {
        n: t.shape for n, t in tensors.items()
    }
