"""Recording what a FLUX reads: pooled text and guidance too, and texts of one length in a batch, since it masks none."""

import comfy.sd
import comfy.text_encoders.flux as flux
import folder_paths
import pytest
import torch

from ppcl_engine.__main__ import run_stage
from ppcl_engine.checkpoint import Weights
from ppcl_engine.data import load_calibration
from ppcl_engine.files import TensorFile
from ppcl_engine.jobs.order import configs, read_order
from ppcl_engine.run import Run
from ppcl_engine.streaming import Teacher

from .test_prompts import NODE, PROMPTS
from .test_record import LIMITS, draw, engine_velocity

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
ROWS = 2
SAMPLING = {"steps": 6, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


@pytest.fixture
def given():
    """Two pictures of a prompt each; the negative prompt is shorter, and drawn with another guidance."""
    generator = torch.Generator().manual_seed(8)
    text, pooled = torch.randn(ROWS, 7, 24, generator=generator), torch.randn(ROWS, 20, generator=generator)
    positive = [[text, {"pooled_output": pooled, "guidance": 3.0}]]
    negative = [[text[:1, :2], {"pooled_output": pooled[:1], "guidance": 2.0}]]
    return {
        "positive": positive,
        "negative": negative,
        "latent_image": {"samples": torch.zeros(ROWS, 16, 8, 12)},
        **SAMPLING,
    }


@pytest.fixture
def record(pack, load, teacher, tmp_path):
    model = load(teacher.name)
    pack("record").check_same_model(model, Weights(teacher))
    path = tmp_path / "calibration.safetensors"
    limits = pack("recording").Limits(**{**LIMITS, "samples": 100})
    return model, pack("record").Recorder(Weights(teacher), path, limits).around(model), path


def test_the_engine_computes_what_the_host_did(run_node, record, given, teacher):
    model, recorded, path = record
    returned = []

    def see(executor, x, t, context, *arguments, **named):
        result = executor(x, t, context, *arguments, **named)
        returned.append((x.clone(), t.clone(), context.clone(), result.clone()))
        return result

    recorded.add_wrapper_with_key("diffusion_model", "test", see)
    assert torch.equal(draw(run_node, recorded, given), draw(run_node, model, given))
    calibration, weights, lengths, compared = load_calibration(path), Weights(teacher), set(), 0
    engine, architecture = Teacher(weights, torch.float32, "cpu", False), weights.architecture
    assert calibration.samples == ROWS * LIMITS["each_picture"]
    for row in calibration.all_inputs():
        with torch.no_grad():
            velocity = engine_velocity(engine, row)
        lengths.add(row["encoder_hidden_states"].shape[1])
        assert row["pooled_projections"].shape[1] == 20
        for i, guidance in enumerate(row["guidance"].tolist()):
            x = architecture.unpack(row["hidden_states"][i : i + 1], row["grid"])[0]
            text = row["encoder_hidden_states"][i]
            assert guidance == (3.0 if len(text) == 7 else 2.0)
            found = [
                result[j]
                for xs, t, c, result in returned
                for j in range(len(xs))
                if torch.equal(xs[j], x) and t[j] == row["timestep"][i] and torch.equal(c[j], text)
            ]
            expected = architecture.unpack(velocity[i : i + 1], row["grid"])[0]
            assert found and float((found[0] - expected).norm() / expected.norm()) < 1e-4
            compared += 1
    assert compared == calibration.samples and lengths == {2, 7}


def test_a_model_with_other_weights_is_refused(pack, load, bundle, teacher):
    model = load(bundle.name, base=teacher.name, switchable=False)
    with pytest.raises(ValueError, match=r"txt_mod.lin.weight is \(96, 32\), not \(192, 32\); record with"):
        pack("record").check_same_model(model, Weights(teacher))


def test_conditioning_of_another_model_is_one_line(run_node, pack, record, given):
    _, recorded, path = record
    for name in ("positive", "negative"):
        del given[name][0][1]["pooled_output"]
    with pytest.raises((ValueError, KeyError), match="pooled"):
        draw(run_node, recorded, given)
    assert not path.exists()


def test_reference_pictures_are_refused(run_node, record, given):
    """The host's FLUX reads them, ours has none."""
    _, recorded, path = record
    given["positive"][0][1]["reference_latents"] = [torch.zeros(1, 16, 8, 12)]
    with pytest.raises(ValueError, match="^calibrations of flux1 hold no reference pictures; sample without them$"):
        draw(run_node, recorded, given)
    assert not path.exists()


@pytest.fixture
def clip():
    """The host's two text encoders of FLUX, with one small random layer each."""

    class Target:
        params = {}
        clip = flux.flux_clip()
        tokenizer = flux.FluxTokenizer

    small = {
        "clip_l_model_config": {
            "hidden_size": 20, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 20
        },
        "t5xxl_model_config": {"d_model": 24, "d_ff": 32, "d_kv": 12, "num_heads": 2, "num_layers": 1},
    }  # fmt: skip
    found = comfy.sd.CLIP(Target, model_options={**small, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.cond_stage_model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def test_the_hosts_text_encoders(run_node, pack, teacher, clip, tmp_path, monkeypatch):
    """What they would give a sampler is what the teacher draws with, pooled text included."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    name, _ = run_node("PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, clip=clip, **NODE)
    folder = pack("paths").runs().path(name)
    ((_, settings),) = read_order(folder).stages
    stored = TensorFile(folder / settings["embeddings"]).read_all()
    with torch.inference_mode():
        (text, more), *_ = clip.encode_from_tokens_scheduled(clip.tokenize("a red fox"))
    assert torch.equal(stored["text"][0], text[0]) and torch.equal(stored["pooled"][0], more["pooled_output"][0])
    assert stored["empty_pooled"].shape == (1, 20)
    for stage, config in configs(read_order(folder), folder):
        run_stage(stage, config)
    calibration = load_calibration(Run(folder).calibration)
    assert calibration.samples == 6 and calibration.batches[0]["pooled_projections"].shape == (2, 20)
