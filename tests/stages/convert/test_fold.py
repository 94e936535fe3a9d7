"""`ppcl fold`: a table gives the model's own bits, a basis keeps its bound, memory stays small,
what does not fit is one line."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.shared.teachers import WIDE, random_teacher
from ppcl_engine import open_model
from ppcl_engine.__main__ import main
from ppcl_engine.architectures import architecture_named
from ppcl_engine.architectures.folded import known_timesteps
from ppcl_engine.models.weights import Weights, expected_shapes, parameter_count
from ppcl_engine.system.machine import CLEAR, PeakMemory
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.folds import relative, tensors_of

TIMESTEPS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("t", TIMESTEPS)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_single_file_as_a_table_gives_the_same_bits(folded, output, teacher_file, samples, t):
    path = folded(teacher_file, "table")
    assert torch.equal(
        output(open_model(path), samples, t), output(open_model(teacher_file), samples, t)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["table", "basis"])
def test_folded_on_a_gpu(folded, teacher_file, architecture, padded_inputs, form):
    """A table gives the bits of the model on that device, a basis keeps its bound."""
    path = folded(teacher_file, form, device="cuda")
    inputs = {**padded_inputs(samples=3), "timestep": torch.full((3,), 0.75)}
    inputs = {name: t if name == "grid" else t.cuda() for name, t in inputs.items()}
    with torch.no_grad():
        found, expected = (
            architecture.call(open_model(model, device="cuda"), inputs)
            for model in (path, teacher_file)
        )
    assert torch.equal(found, expected) if form == "table" else relative(found, expected) < 0.5


def test_a_basis_within_its_bound(folded, output, teacher_file, tmp_path):
    report = {}
    for bound in (0.8, 0.5):
        path = folded(teacher_file, "basis", bound=bound)
        report[bound] = json.loads((tmp_path / "folded.json").read_text())
        row = next(r for r in report[bound]["curve"] if r["rank"] == report[bound]["rank"])
        assert row["worst"] <= bound and (tmp_path / "folded.png").stat().st_size > 10_000
        assert relative(output(open_model(path)), output(open_model(teacher_file))) < bound
    assert report[0.8]["rank"] < report[0.5]["rank"]
    assert "Error against rank" in (tmp_path / "folded.html").read_text()


def test_a_rank_by_hand(folded, output, teacher_file):
    errors = [
        relative(
            output(open_model(folded(teacher_file, "basis", rank=r))),
            output(open_model(teacher_file)),
        )
        for r in (2, 30)
    ]
    assert errors[0] > 5 * errors[1] > 0


def test_parameters_and_bytes_go(folded, teacher_file, tmp_path):
    full = parameter_count(open_model(teacher_file))
    model = open_model(folded(teacher_file, "table", samples="1"))
    modulations = 6 * 2 * 192 * (32 + 1)
    assert parameter_count(model) == full - modulations + 6 * 2 * 192 * len(TIMESTEPS)
    (sizes,) = json.loads((tmp_path / "folded.json").read_text())["sizes"]
    assert sizes["parameters"] == full and sizes["modulations"] == modulations
    # and the timesteps themselves
    assert sizes["folded_parameters"] == parameter_count(model) + len(TIMESTEPS)


def test_timesteps_by_hand_and_several_schedules(folded, teacher_file):
    inputs = open_model(folded(teacher_file, "table", steps="2 4")).time_text_embed.folding
    assert inputs.timesteps.tolist() == [1, 0.5, 0.75, 0.25]
    by_hand = open_model(folded(teacher_file, "table", timesteps="1, 0.3")).time_text_embed.folding
    torch.testing.assert_close(by_hand.timesteps, torch.tensor([1, 0.3]))


def test_timesteps_as_the_host_gives_them(folded, teacher_file, output):
    """diffusers rounds them to bf16, ComfyUI does not; each finds its own."""
    found = {
        host: folded(teacher_file, "table", host=host, dtype="bfloat16", timesteps="0.3", name=host)
        for host in ("diffusers", "comfyui")
    }
    known = {h: TensorFile(p).read("time_text_embed.folding.timesteps") for h, p in found.items()}
    assert (
        known["diffusers"].item() == torch.tensor(0.3).bfloat16().item()
        and known["comfyui"].item() == torch.tensor(0.3).item()
    )


def test_its_precision_is_what_this_machine_generates_in(folded, teacher_file):
    """So that `ppcl fold` and `ppcl generate` fit together with no setting."""
    path = folded(teacher_file, "table", dtype="auto", timesteps="0.3")
    precision = open_model(path).time_text_embed.folding.precision
    assert (
        precision is torch.float32
        and TensorFile(path).dtype("transformer_blocks.0.img_mod.1.weight") is precision
    )


def test_a_table_that_lacks_timesteps_asks_its_base(folded, output, teacher_file):
    path = folded(teacher_file, "table", samples="1 3")
    model = open_model(path, base=teacher_file)
    known_timesteps(model, [0.9, 0.75, 0.1])
    assert model.time_text_embed.folding.timesteps.tolist() == pytest.approx([*TIMESTEPS, 0.9, 0.1])
    for t in (0.9, 0.1, *TIMESTEPS):
        for samples in (1, 3):
            assert torch.equal(
                output(model, samples, t), output(open_model(teacher_file), samples, t)
            )
    untold = open_model(path, base=teacher_file)  # as in anybody's own loop over timesteps
    assert torch.equal(output(untold, 3, 0.6), output(open_model(teacher_file), 3, 0.6))
    with pytest.raises(
        ValueError,
        match="no timestep 0.9, and no base file is given; it has 1, 0.75, 0.5, 0.25 in float32",
    ):
        known_timesteps(open_model(path), [0.9])


def test_a_table_of_another_model(folded, teacher_file, make_model, save_model, tmp_path):
    other = save_model(tmp_path / "other.safetensors", make_model(seed=1))
    path = folded(teacher_file, "table")
    message = "other.safetensors is another model than .* was folded from"
    with pytest.raises(ValueError, match=message):
        known_timesteps(open_model(path, base=other), [0.9])
    with pytest.raises(ValueError, match=message):
        folded(path, "off", base=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "basis", "rank": 0}, "--rank 0: choose a whole number from 1 to 100,000"),
        (
            {"form": "basis", "rank": 32},
            "rank .*32.* of 32 inputs saves nothing; fold with --form table",
        ),
        ({"form": "basis", "bound": 0.0}, "--bound 0.0: choose a number from 1e-06 to 0.99"),
        (
            {"form": "basis", "bound": 1e-6},
            "no useful rank keeps the error within 1e-06: rank .* fold with form table",
        ),
        (
            {"form": "table", "steps": "none"},
            "--steps 'none': numbers of sampling steps, as '8 20'",
        ),
        ({"form": "table", "timesteps": "7"}, "--timesteps '7': numbers from 0 to 1"),
        ({"form": "table", "samples": "0"}, "--samples '0': whole numbers from 1"),
        ({"form": "table", "samples": "1 99999"}, "--samples '1 99999': numbers from 1 to 1,024"),
        ({"form": "table", "name": "../up"}, "letters, digits"),
        ({"form": "off"}, "--form off needs --base, the file that was folded"),
    ],
)
def test_bad_settings_are_one_line(folded, teacher_file, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        folded(teacher_file, **settings)
    assert "\n" not in str(error.value)


def test_a_setting_that_the_form_does_not_read_is_told(folded, teacher_file, capsys):
    for form, said in (
        ("table", "--bound has no effect, since --form table does not read it\n"),
        ("basis", "--steps has no effect, since --form basis does not read it\n"),
    ):
        folded(teacher_file, form)
        assert said in capsys.readouterr().err
    folded(teacher_file, "table", timesteps="1 0.5", bound=0.01)
    assert "--steps has no effect, since --timesteps is given\n" in capsys.readouterr().err


def test_files_that_cannot_be_folded(folded, teacher_file, tmp_path):
    path = folded(teacher_file, "table")
    with pytest.raises(ValueError, match=r"is folded already \(table\); unfold it first"):
        folded(path, "basis")
    with pytest.raises(ValueError, match="was not made by folding a file"):
        folded(teacher_file, "off", base=teacher_file)
    config = {**Weights(teacher_file).config, "guidance_embeds": True}
    write_tensors(
        tmp_path / "guided.safetensors", tensors_of(teacher_file), {"config": json.dumps(config)}
    )
    with pytest.raises(
        ValueError,
        match="modulations read the timestep and guidance: only those that read the timestep",
    ):
        folded(tmp_path / "guided.safetensors", "table")


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("flux1", "the timestep, guidance and pooled text"),
        ("sd35", "the timestep and pooled text"),
    ],
)
def test_other_architectures_say_why_not(folded, tmp_path, name, reads):
    architecture = architecture_named(name)
    shapes = expected_shapes(architecture, architecture.tiny_config)
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    write_tensors(
        tmp_path / "other.safetensors", tensors, {"config": json.dumps(architecture.tiny_config)}
    )
    for form in ("table", "basis"):
        with pytest.raises(
            ValueError,
            match=f"other.safetensors is {name}, whose modulations read {reads}: only those that",
        ):
            folded(tmp_path / "other.safetensors", form)


@pytest.mark.parametrize("name", ["z_image", "qwen_image_21"])
def test_small_modulations_are_not_folded(folded, tmp_path, name):
    architecture = architecture_named(name)
    shapes = expected_shapes(architecture, architecture.tiny_config)
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    write_tensors(
        tmp_path / "other.safetensors", tensors, {"config": json.dumps(architecture.tiny_config)}
    )
    with pytest.raises(ValueError, match=f"is {name}, .*save little and is not written; use it as"):
        folded(tmp_path / "other.safetensors", "table")


def test_by_the_command_line(teacher_file, tmp_path, capsys):
    arguments = [
        "fold",
        "--path",
        str(teacher_file),
        "--form",
        "basis",
        "--rank",
        "3",
        "--run",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "basis of rank 3: " in out and "% worst" in out and "folded.safetensors" in out
    assert main([*arguments[:-4], "--rank", "0", "--run", str(tmp_path)]) == 2


@pytest.mark.skipif(not CLEAR.exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize("form", ["table", "basis"])
def test_memory_stays_under_two_blocks(folded, teacher_file, tmp_path, form):
    """Also when it is unfolded; the file itself is four blocks."""
    width = 512
    config = {**WIDE, "num_layers": 4}
    random_teacher(tmp_path / "wide.safetensors", config, seed=0)
    two_blocks = 2 * 36 * width**2 * 4
    folded(teacher_file, form)  # libraries, pictures' fonts
    memory = PeakMemory("cpu")
    path = folded(tmp_path / "wide.safetensors", form, rank=16)
    assert memory.above_start() < two_blocks
    memory = PeakMemory("cpu")
    folded(path, "off", base=tmp_path / "wide.safetensors", name="back")
    assert memory.above_start() < two_blocks
