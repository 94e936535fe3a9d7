"""Recording an edit model: references are kept with every state, and a job runs on what was
recorded."""

import json

import folder_paths
import pytest
import torch

from ppcl_engine.architectures import REFERENCES
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.jobs.state import JobState, write_state
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..forwards import calls_of, relative_error, velocity_of
from .test_record import LIMITS, ROWS, SAMPLING, draw, engine_velocity

# tokens of a prompt -> latents of its references, odd ones too
SIZES = {7: ((8, 12), (3, 7)), 2: ((3, 7),)}
GRIDS = {7: [[1, 4, 6], [1, 4, 6], [1, 2, 4]], 2: [[1, 4, 6], [1, 2, 4]]}
MARK = "__index_timestep_zero__"
NODE = {"samples": 24, "each_picture": 4, "batch": 4, "empty_captions": 0.4, "seed": 3}
JOB = {
    "device": "cpu",
    "dtype": "float32",
    "streamed": False,
    "wait": True,
    "start": False,
    "keep_running": False,
}
PROBE = {"ridge": 1e-4, "train_steps": 0, "learning_rate": 1e-4, "held_out": 1}
DETECT = {
    "method": "budget",
    "remove": 2,
    "longest": 3,
    "protect": "",
    "samples": 8,
    "tokens": 3,
    "bootstrap": 2,
    "eps": 0.02,
    "max_drop": 0.25,
    "seed": 0,
}
WIDTH = {
    "share": 0.5,
    "form": "best",
    "longest": 8,
    "rounds": 1,
    "updates": 1,
    "learning_rate": 1e-5,
    "give_back": True,
    "warm_up": 1,
    "cache_gb": 1.0,
}


@pytest.fixture
def given(run_node):
    """Three pictures, each with references of its own; the negative prompt is shorter and has less
    of them."""
    generator, conditionings = torch.Generator().manual_seed(8), {}
    for name, tokens in (("positive", 7), ("negative", 2)):
        conditioning = [[torch.randn(ROWS, tokens, 24, generator=generator), {}]]
        for size in SIZES[tokens]:
            latent = {"samples": torch.randn(ROWS, 16, 1, *size, generator=generator)}
            (conditioning,) = run_node("ReferenceLatent", conditioning=conditioning, latent=latent)
        conditionings[name] = conditioning
    return {
        **conditionings,
        "latent_image": {"samples": torch.zeros(ROWS, 16, 1, 8, 12)},
        **SAMPLING,
    }


@pytest.fixture
def record(pack, load, teacher, tmp_path):
    """(MODEL, recorded MODEL, where its set is)"""
    model, path = load(teacher.name), tmp_path / "calibration.safetensors"
    limits = pack("sampling.recording").Limits(**{**LIMITS, "samples": 100})
    return (
        model,
        pack("sampling.recorder").Recorder(Weights(teacher), path, limits).around(model),
        path,
    )


def placed_by(run_node, given, method: str, pictures: int = 2) -> dict:
    """The positive prompt with its first references, by a method of the host."""
    text, more = given["positive"][0]
    conditioning = [[text, {"reference_latents": more["reference_latents"][:pictures]}]]
    node = "FluxKontextMultiReferenceLatentMethod"
    return {
        **given,
        "positive": run_node(node, conditioning=conditioning, reference_latents_method=method)[0],
    }


def test_the_engine_computes_what_the_host_did(run_node, record, given, teacher):
    model, recorded, path = record
    returned = calls_of(recorded)
    assert torch.equal(draw(run_node, recorded, given), draw(run_node, model, given))
    calibration, weights = load_calibration(path), Weights(teacher)
    compared = dict.fromkeys(SIZES, 0)
    engine, architecture = Teacher(weights, torch.float32, "cpu", False), weights.architecture
    for row in calibration.all_inputs():
        with torch.no_grad():
            velocity = engine_velocity(engine, row)
        length = row["encoder_hidden_states"].shape[1]
        assert row["grid"].tolist() == GRIDS[length]
        x = architecture.unpack(row["hidden_states"], row["grid"])
        expected = architecture.unpack(velocity, row["grid"])
        for i, text in enumerate(row["encoder_hidden_states"]):
            host = velocity_of(returned, x[i], row["timestep"][i], text)
            assert relative_error(host, expected[i]) < 1e-4
            compared[length] += 1
    assert sum(compared.values()) == calibration.samples == ROWS * LIMITS["each_picture"]
    assert min(compared.values()) > 1


def test_each_picture_keeps_its_own(run_node, record, given, architecture):
    """In the model's own space, filled up to whole tokens."""
    model, recorded, path = record
    draw(run_node, recorded, given)
    second = model.model.process_latent_in(given["negative"][0][1]["reference_latents"][0])[:, :, 0]
    second = torch.cat([second, second[:, :, :1]], dim=2)
    known = architecture.pack(torch.cat([second, second[:, :, :, :1]], dim=3))
    batches = [b for b in load_calibration(path).batches if len(b["grid"]) == 2]
    rows = torch.cat([batch[REFERENCES] for batch in batches])
    near = [(row - known).abs().amax((1, 2)) for row in rows]
    assert (
        all(float(distance.min()) < 1e-6 for distance in near)
        and len({int(d.argmin()) for d in near}) > 1
    )


@pytest.fixture
def recording(run_node, load, teacher, given, tmp_path, monkeypatch) -> str:
    """Name of a run that the node recorded."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    recorded, run = run_node(
        "PPCL_RecordCalibration", model=load(teacher.name), model_file=teacher.name, **NODE
    )
    draw(run_node, recorded, given)
    return run


@pytest.fixture
def job(run_node, pack):
    """The folder of a job that a node prepared, and its settings; done here where `do` says so."""

    def make(node: str, run: str, do: bool = False, **widgets):
        name, *_ = run_node(f"PPCL_{node}", run=run, **widgets, **JOB)
        folder = pack("paths").runs().path(name)
        spec = read_spec(folder)
        for stage, config in configs(spec, folder) if do else ():
            run_stage(stage, config)
            write_state(folder, JobState(status="done"))
        return Run(folder), [settings for _, settings in spec.stages]

    return make


def test_jobs_run_on_a_recording(job, recording):
    """Its statistics count references, or not."""
    rows = []
    for only in (False, True):
        run, _ = job("Probe", recording, do=True, **PROBE, target_tokens_only=only)
        report = json.loads(TensorFile(run.probe(2)).metadata["report"])
        rows.append(report["image"]["rows"])
    assert rows[0] > rows[1] > 0
    run, _ = job("Detect", run.folder.name, do=True, **DETECT, target_tokens_only=True)
    assert sum(len(interval.blocks) - 1 for interval in run.load_plan().intervals) == 2


def test_a_job_of_an_older_workflow_has_the_settings_default(job, recording):
    assert all(
        "target_tokens_only" not in settings for settings in job("Probe", recording, **PROBE)[1]
    )


def test_both_stages_of_width_have_it(pack):
    width = pack("make.distil")._width_stages("by share", {**WIDTH, "target_tokens_only": True})
    assert [settings["target_tokens_only"] for _, _, settings in width] == [True, True]


@pytest.mark.parametrize("method", ["offset", "uxo/uno"])
def test_a_way_to_place_them_that_the_engine_has_not(run_node, record, given, method):
    _, recorded, path = record
    line = "ComfyUI reads the reference pictures by the method .*, this model reads them by index; take out the node"
    with pytest.raises(ValueError, match=line) as caught:
        draw(run_node, recorded, placed_by(run_node, given, method))
    assert "\n" not in str(caught.value) and not path.exists()


def test_one_picture_stands_alike_by_every_method(run_node, record, given, pack):
    model, recorded, path = record
    pictures = [
        draw(run_node, model, placed_by(run_node, given, m, pictures=1))
        for m in ("index", "offset")
    ]
    assert torch.equal(*pictures)
    draw(run_node, recorded, placed_by(run_node, given, "offset", pictures=1))
    assert load_calibration(path).samples == ROWS * LIMITS["each_picture"]


def test_a_model_of_references_at_t_0_on_a_host_without_it(
    run_node, pack, load, teacher, models, given, tmp_path
):
    """Its file says so; the host modulates them as the picture, and what it draws is not what the
    model learned."""
    file = models.diffusion_models / "marked.safetensors"
    config = {"config": json.dumps({**Weights(teacher).config, "zero_cond_t": True})}
    write_tensors(file, {**TensorFile(teacher).read_all(), MARK: torch.empty(0)}, config)
    model, limits = load(file.name), pack("sampling.recording").Limits(**LIMITS)
    assert model.model.diffusion_model.ppcl.structure.config["zero_cond_t"]
    recorder = pack("sampling.recorder").Recorder(
        Weights(file), tmp_path / "none.safetensors", limits
    )
    if hasattr(model.model.diffusion_model, "default_ref_method"):
        pytest.skip("this ComfyUI knows it")
    with pytest.raises(
        ValueError, match="by the method index, this model reads them by index_timestep_zero; "
    ):
        draw(run_node, recorder.around(model), given)
