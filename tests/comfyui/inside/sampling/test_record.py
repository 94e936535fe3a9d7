"""Recording: what the host's model saw and returned is what the engine's teacher computes; pictures
do not change."""

import pytest
import torch

from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights

from ..forwards import calls_of, relative_error, velocity_of

SAMPLING = {"steps": 6, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
LIMITS = {"samples": 24, "each_picture": 4, "batch": 5, "empty_captions": 0.4, "seed": 3}
ROWS = 3


@pytest.fixture
def given(inputs):
    """Three pictures of one prompt each; the negative prompt is shorter."""
    generator = torch.Generator().manual_seed(8)
    text = torch.randn(ROWS, 7, 24, generator=generator)
    latent = {"samples": torch.zeros(ROWS, 16, 1, 8, 12)}
    return {
        "positive": [[text, {}]],
        "negative": [[text[:1, :1], {}]],
        "latent_image": latent,
        **SAMPLING,
    }


@pytest.fixture
def model(load, teacher):
    return load(teacher.name)


@pytest.fixture
def record(pack, model, teacher, tmp_path):
    """(recorded MODEL, where its set is) with these limits."""

    def make(model=model, **changes):
        limits = pack("sampling.recording").Limits(**{**LIMITS, **changes})
        path = tmp_path / "calibration.safetensors"
        return pack("sampling.recorder").Recorder(Weights(teacher), path, limits).around(
            model
        ), path

    return make


def draw(run_node, model, given, seed=1, **changes) -> torch.Tensor:
    return run_node("KSampler", model=model, seed=seed, **{**given, **changes})[0]["samples"]


def test_pictures_do_not_change(run_node, model, record, given):
    recorded, path = record()
    assert torch.equal(draw(run_node, recorded, given), draw(run_node, model, given))
    assert path.exists()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_the_engine_computes_what_the_host_did(run_node, model, record, given, teacher, sampler):
    """Every recorded sample through the engine's teacher, and through the host's model in one
    forward."""
    recorded, path = record()
    returned = calls_of(recorded)
    draw(run_node, recorded, given, sampler_name=sampler)
    calibration, weights = load_calibration(path), Weights(teacher)
    engine, architecture = Teacher(weights, torch.float32, "cpu", False), weights.architecture
    compared = 0
    assert calibration.samples == ROWS * LIMITS["each_picture"]
    for row in calibration.all_inputs():
        with torch.no_grad():
            velocity = engine_velocity(engine, row)
        for i in range(len(velocity)):
            length = int(row["encoder_hidden_states_mask"][i].sum())
            x = architecture.unpack(row["hidden_states"][i : i + 1], row["grid"])
            text = row["encoder_hidden_states"][i, :length]
            host = velocity_of(returned, x[0], row["timestep"][i], text)
            expected = architecture.unpack(velocity[i : i + 1], row["grid"])[0]
            assert relative_error(host, expected) < 1e-4
            compared += 1
    assert compared == calibration.samples


def engine_velocity(teacher: Teacher, row: dict) -> torch.Tensor:
    state = teacher.embed(row)
    for index in range(teacher.num_blocks):
        state = teacher.architecture.run_block(teacher.block(index), state)
    return teacher.architecture.finish(teacher.outer, state)


def test_the_clean_picture_is_the_samplers(run_node, model, record, given, architecture):
    """In the model's own space: the host's latent format is undone."""
    recorded, path = record(empty_captions=0.0)
    pictures = model.model.process_latent_in(draw(run_node, recorded, given))[:, :, 0]
    calibration = load_calibration(path)
    known = architecture.pack(pictures)
    for batch in calibration.batches:
        for clean in batch["clean"]:
            assert min(float((clean - row).abs().max()) for row in known) < 1e-5
        assert batch["encoder_hidden_states_mask"].all()  # no negative prompt among them


def test_states_are_spread_over_the_schedule(run_node, record, given):
    recorded, path = record(each_picture=6, samples=100)
    draw(run_node, recorded, given)
    timesteps = torch.cat([batch["timestep"] for batch in load_calibration(path).batches])
    # every step of every picture
    assert len(timesteps) == 6 * ROWS and len(timesteps.unique()) == 6


def test_the_negative_prompts_share(pack):
    limits = pack("sampling.recording").Limits(
        **{**LIMITS, "samples": 4000, "each_picture": 10, "empty_captions": 0.1}
    )
    wanted = pack("sampling.recording").wanted_states(limits, 0, rows=300, steps=20)
    assert len(wanted) == 3000 and 0.08 < sum(wanted.values()) / len(wanted) < 0.12
    assert wanted == pack("sampling.recording").wanted_states(limits, 0, rows=300, steps=20)
    assert wanted != pack("sampling.recording").wanted_states(limits, 1, rows=300, steps=20)


def test_guidance_of_one_has_no_negative_prompt(run_node, record, given):
    recorded, path = record(empty_captions=1.0)
    draw(run_node, recorded, given, cfg=1.0)
    assert load_calibration(path).samples == ROWS * LIMITS["each_picture"]


def test_it_grows_to_its_cap_and_then_stays(run_node, record, given):
    recorded, path = record(samples=20)
    counts = []
    for seed in (1, 2, 3):
        draw(run_node, recorded, given, seed=seed)
        counts.append(load_calibration(path).samples)
    kept = load_calibration(path).hash
    draw(run_node, recorded, given, seed=4)
    assert counts == [12, 20, 20] and load_calibration(path).hash == kept


def test_the_same_seed_records_the_same(run_node, record, given):
    hashes = []
    for _ in range(2):
        recorded, path = record()
        draw(run_node, recorded, given)
        hashes.append(load_calibration(path).hash)
        path.unlink()
    assert hashes[0] == hashes[1]


def test_an_unfinished_picture_is_not_recorded(
    run_node, record, given, pack, model, teacher, tmp_path
):
    texts = []
    recorder = pack("sampling.recorder").Recorder(
        Weights(teacher),
        tmp_path / "none.safetensors",
        pack("sampling.recording").Limits(**LIMITS),
        texts.append,
    )
    advanced = {k: v for k, v in given.items() if k != "denoise"}
    run_node(
        "KSamplerAdvanced",
        model=recorder.around(model),
        add_noise="enable",
        noise_seed=1,
        start_at_step=0,
        end_at_step=3,
        return_with_leftover_noise="enable",
        **advanced,
    )
    assert texts == ["not recorded: this sampling stops before its pictures are clean"]
    assert not recorder.path.exists()


def test_nothing_is_kept_of_a_sampling_that_fails(run_node, record, given):
    recorded, path = record()

    def fail(executor, *arguments, **named):
        raise MemoryError("full")

    recorded.add_wrapper_with_key("diffusion_model", "test", fail)
    with pytest.raises(MemoryError):
        draw(run_node, recorded, given)
    assert not path.exists()


def test_another_model_is_refused(
    pack, load, switched, model, teacher, models, make_model, save_model, bundle
):
    check, full = pack("make.record_calibration").check_same_model, Weights(teacher)
    deeper = make_model(num_layers=7, in_channels=64, out_channels=16)
    deeper = Weights(save_model(models.diffusion_models / "deep.safetensors", deeper))
    both = load(bundle.name, base=teacher.name)
    check(model, full)
    check(switched(both, variant="full"), full)
    for given, weights, found in (
        (model, deeper, "transformer_blocks.6.img_mod.1.weight is missing"),
        (
            load(bundle.name, base=teacher.name, switchable=False),
            full,
            r"txt_mod.1.weight is \(96, 32\), not \(192, 32\)",
        ),
        (switched(both, variant="small"), full, "the MODEL runs as the variant 'small'"),
    ):
        with pytest.raises(ValueError, match=f"{found}; record with the full model of "):
            check(given, weights)


def test_sides_that_are_no_whole_tokens(run_node, record, given):
    recorded, _ = record()
    with pytest.raises(ValueError, match="latents of 7 x 12 cannot be packed into tokens"):
        draw(run_node, recorded, given, latent_image={"samples": torch.zeros(ROWS, 16, 1, 7, 12)})
