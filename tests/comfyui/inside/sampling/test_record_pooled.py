"""Recording what FLUX and SD3.5 read: pooled text too, on FLUX guidance, and texts of one length in
a batch, since they mask none."""

import signal
from contextlib import nullcontext

import comfy.sd
import comfy.text_encoders.flux as flux
import comfy.text_encoders.sd3_clip as sd35
import folder_paths
import pytest
import torch

from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.jobs.attempt import main as work
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system.tensor_files import TensorFile

from ..conftest import host_nodes
from ..forwards import relative_error, velocity_of
from ..make.test_prompts import NODE, PROMPTS
from .test_record import LIMITS, draw, engine_velocity

pytestmark = pytest.mark.parametrize("architecture", ["flux1", "sd35"], indirect=True)
ROWS = 2
SAMPLING = {"steps": 6, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


@pytest.fixture
def given(host_case):
    """Two pictures of a prompt each; the negative prompt is shorter, and drawn with another
    guidance where there is one."""
    generator = torch.Generator().manual_seed(8)
    text, pooled = (
        torch.randn(ROWS, 7, 24, generator=generator),
        torch.randn(ROWS, 20, generator=generator),
    )
    guidances = [{"guidance": value} if host_case.guidance else {} for value in (3.0, 2.0)]
    positive = [[text, {"pooled_output": pooled, **guidances[0]}]]
    negative = [[text[:1, :2], {"pooled_output": pooled[:1], **guidances[1]}]]
    return {
        "positive": positive,
        "negative": negative,
        "latent_image": {"samples": torch.zeros(ROWS, 16, 8, 12)},
        **SAMPLING,
    }


@pytest.fixture
def record(pack, load, teacher, tmp_path):
    model = load(teacher.name)
    pack("make.record_calibration").check_same_model(model, Weights(teacher))
    path = tmp_path / "calibration.safetensors"
    limits = pack("sampling.recording").Limits(**{**LIMITS, "samples": 100})
    return (
        model,
        pack("sampling.recorder").Recorder(Weights(teacher), path, limits).around(model),
        path,
    )


def test_the_engine_computes_what_the_host_did(run_node, record, given, teacher, host_case):
    model, recorded, path = record
    returned = []

    def see(module, arguments, named, result):
        returned.append(
            (*(tensor.clone() for tensor in arguments), named["context"].clone(), result.clone())
        )

    seen = model.model.diffusion_model.register_forward_hook(see, with_kwargs=True)
    assert torch.equal(draw(run_node, recorded, given), draw(run_node, model, given))
    seen.remove()
    calibration, weights, lengths, compared = load_calibration(path), Weights(teacher), set(), 0
    engine, architecture = Teacher(weights, torch.float32, "cpu", False), weights.architecture
    timestep = model.model.model_sampling.timestep  # of our t, as the model itself reads it
    assert calibration.samples == ROWS * LIMITS["each_picture"]
    for row in calibration.all_inputs():
        with torch.no_grad():
            velocity = engine_velocity(engine, row)
        lengths.add(row["encoder_hidden_states"].shape[1])
        assert row["pooled_projections"].shape[1] == 20
        assert ("guidance" in row) == bool(host_case.guidance)
        for i in range(len(velocity)):
            x = architecture.unpack(row["hidden_states"][i : i + 1], row["grid"])[0]
            text = row["encoder_hidden_states"][i]
            assert not host_case.guidance or row["guidance"][i] == (3.0 if len(text) == 7 else 2.0)
            host = velocity_of(returned, x, timestep(row["timestep"][i]), text)
            expected = architecture.unpack(velocity[i : i + 1], row["grid"])[0]
            assert relative_error(host, expected) < 1e-4
            compared += 1
    assert compared == calibration.samples
    assert lengths == {2, 7}


CUT = {
    "flux1": r"txt_mod.lin.weight is \(96, 32\), not \(192, 32\); record with",
    "sd35": r"context_block.adaLN_modulation.1.weight is \(384, 128\), not \(768, 128\); record with",
}


def test_a_model_with_other_weights_is_refused(pack, load, bundle, teacher, architecture):
    model = load(bundle.name, base=teacher.name, switchable=False)
    with pytest.raises(ValueError, match=CUT[architecture.name]):
        pack("make.record_calibration").check_same_model(model, Weights(teacher))


def test_conditioning_of_another_model_is_one_line(run_node, pack, record, given):
    _, recorded, path = record
    for name in ("positive", "negative"):
        del given[name][0][1]["pooled_output"]
    with pytest.raises((ValueError, KeyError), match="pooled"):
        draw(run_node, recorded, given)
    assert not path.exists()


def test_reference_pictures_are_refused(run_node, record, given, architecture):
    """The host's FLUX reads them, ours has none; its SD3.5 does not."""
    _, recorded, path = record
    given["positive"][0][1]["reference_latents"] = [torch.zeros(1, 16, 8, 12)]
    read = architecture.name == "flux1"
    message = "^calibrations of flux1 hold no reference pictures; sample without them$"
    with pytest.raises(ValueError, match=message) if read else nullcontext():
        draw(run_node, recorded, given)
    assert path.exists() == (not read)


def clip_sizes(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": width,
    }


T5 = {"d_model": 24, "d_ff": 32, "d_kv": 12, "num_heads": 2, "num_layers": 1}
# the host's class, its tokenizer, small sizes; what a teacher then reads: SD3.5's fill up to T5's
# real width
ENCODERS = {
    "flux1": (flux.flux_clip(), flux.FluxTokenizer, {"clip_l": clip_sizes(20), "t5xxl": T5}, {}),
    "sd35": (
        sd35.sd3_clip(t5=False),
        sd35.SD3Tokenizer,
        {"clip_l": clip_sizes(8), "clip_g": clip_sizes(12)},
        {"joint_attention_dim": 4096},
    ),
}


@pytest.fixture
def clip(architecture):
    """The host's text encoders, with a few small random layers each."""
    made, reads_tokens, sizes, _ = ENCODERS[architecture.name]

    class Target:
        params = {}
        clip = made
        tokenizer = reads_tokens

    small = {f"{name}_model_config": config for name, config in sizes.items()}
    encoder = comfy.sd.CLIP(Target, model_options={**small, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.cond_stage_model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


@pytest.fixture
def reader(architecture, models, save_model, make_model, host_case):
    """A teacher that reads what `clip` gives."""
    changes = ENCODERS[architecture.name][-1]
    model = make_model(**{**host_case.channels, **changes})
    return save_model(models.diffusion_models / f"{host_case.file}_reader.safetensors", model)


def test_the_hosts_text_encoders(run_node, pack, reader, clip, tmp_path, monkeypatch):
    """What they would give a sampler is what the teacher draws with, pooled text included."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    name, _ = run_node(
        "PPCL_CalibrateFromPrompts", model_file=reader.name, prompts=PROMPTS, clip=clip, **NODE
    )
    folder = pack("paths").runs().path(name)
    ((_, settings),) = read_spec(folder).stages
    stored = TensorFile(folder / settings["embeddings"]).read_all()
    with torch.inference_mode():
        (text, more), *_ = clip.encode_from_tokens_scheduled(clip.tokenize("a red fox"))
    assert torch.equal(stored["text"][0], text[0]) and torch.equal(
        stored["pooled"][0], more["pooled_output"][0]
    )
    assert stored["empty_pooled"].shape == (1, 20)
    for stage, config in configs(read_spec(folder), folder):
        run_stage(stage, config)
    calibration = load_calibration(Run(folder).calibration)
    assert calibration.samples == 6 and calibration.batches[0]["pooled_projections"].shape == (
        2,
        20,
    )


JOBS = {
    "Probe": {},
    "Detect": {"remove": 1, "longest": 2, "bootstrap": 2, "samples": 8, "tokens": 2},
    "DistillDepth": {"rounds": 1, "updates": 2, "warm_up": 1, "preview_seconds": 0},
    "Export": {"store": "float32"},
}


@pytest.fixture
def job(run_node, pack):
    """A job's node at its defaults, its work done in this process; gives all that the node gives
    then."""

    def run(kind: str, upstream: str, **settings):
        schema = host_nodes.NODE_CLASS_MAPPINGS[f"PPCL_{kind}"].define_schema()
        given = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
        given |= {"run": upstream, "device": "cpu", "start": False, **settings}
        name, *_ = run_node(f"PPCL_{kind}", **given)
        with torch.inference_mode(False):
            assert work([str(pack("paths").runs().path(name))]) == 0
        return run_node(f"PPCL_{kind}", **given)

    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


def test_from_a_recording_to_a_bundle(
    run_node, load, job, teacher, given, engine_velocity, velocity, tmp_path, monkeypatch
):
    """The nodes of the method, one behind the other."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    limits = {**LIMITS, "batch": 4}
    recorded, run = run_node(
        "PPCL_RecordCalibration", model=load(teacher.name), model_file=teacher.name, **limits
    )
    draw(run_node, recorded, given)
    for kind, settings in JOBS.items():
        run, *found = job(kind, run, **settings)
    file = found[-1]
    path = tmp_path / "ppcl" / file.removeprefix("runs/").replace("/", "/exports/")
    assert (
        relative_error(
            velocity(load(file, base=teacher.name)), engine_velocity(path, None, teacher)
        )
        < 1e-4
    )
