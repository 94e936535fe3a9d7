"""`ppcl fold` on every kind of file: a table gives the model's own bits, a basis keeps its bound, unfolding gives the file
back, and what does not fit is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ppcl_engine.demo
from benchmarks.memory import WIDE
from benchmarks.teachers import random_teacher
from ppcl_engine import open_model
from ppcl_engine.__main__ import main
from ppcl_engine.architectures import architecture_named
from ppcl_engine.bundle import Bundle
from ppcl_engine.checkpoint import COMFYUI_PREFIX, Weights, expected_shapes, parameter_count
from ppcl_engine.codecs import open_codec
from ppcl_engine.config import FinetuneConfig
from ppcl_engine.config_files import ExportConfig, FoldConfig, InspectConfig
from ppcl_engine.files import TensorFile, write_tensors
from ppcl_engine.folding_tables import known_timesteps
from ppcl_engine.memory import CLEAR, PeakMemory
from ppcl_engine.run import Run
from ppcl_engine.sampling import draw_prompts, encode_prompts
from ppcl_engine.stages.export import export
from ppcl_engine.stages.finetune import finetune
from ppcl_engine.stages.fold import fold
from ppcl_engine.stages.inspect import inspect

from ..tuned import write_parts

DEMO = Path(ppcl_engine.demo.__file__).parent
VARIANTS = ("full", "small", "smallest", "1-2,text:3-4", "3-4,ffn_image:1", "smallest_tuned")
STEPS = 4
TIMESTEPS = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file, make_run) -> Run:
    """Students of both forms, projections of all kinds, a tuned variant with a time embedder of its own."""
    run = Run(make_run(tmp_path_factory.mktemp("run"), teacher_file))
    write_parts(run, teacher_file)
    settings = {"variant": "smallest", "steps": 2, "learning_rate": 1e-2, "warm_up": 1}
    finetune(FinetuneConfig(model=teacher_file, run=run.folder, device="cpu", **settings))
    return run


@pytest.fixture(scope="module")
def exported(run, teacher_file):
    def make(layout: str, variant: str = "smallest"):
        return export(
            ExportConfig(
                model=teacher_file,
                run=run.folder,
                layout=layout,
                variant=variant,
                store="float32",
                name=variant.replace(",", "_").replace(":", "_"),
            )
        )

    return make


@pytest.fixture
def folded(tmp_path):
    def make(path, form: str, **settings):
        given = {"steps": str(STEPS), "dtype": "float32", "samples": "1 3", "bound": 0.5, "device": "cpu"}
        return fold(FoldConfig(path=path, form=form, run=tmp_path, **{**given, **settings}))

    return make


@pytest.fixture
def output(architecture, padded_inputs):
    """What a model gives for some samples at a timestep."""

    def run(model, samples: int = 3, t: float = 0.75) -> torch.Tensor:
        with torch.no_grad():
            return architecture.call(model, {**padded_inputs(samples=samples), "timestep": torch.full((samples,), t)})

    return run


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def tensors_of(path) -> dict[str, torch.Tensor]:
    return TensorFile(path).read_all()


def same_files(one, other) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == t.dtype and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (ours[name], t)))
        for name, t in theirs.items()
    )


@pytest.mark.parametrize("t", TIMESTEPS)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_single_file_as_a_table_gives_the_same_bits(folded, output, teacher_file, samples, t):
    path = folded(teacher_file, "table")
    assert torch.equal(output(open_model(path), samples, t), output(open_model(teacher_file), samples, t))


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
        relative(output(open_model(folded(teacher_file, "basis", rank=r))), output(open_model(teacher_file)))
        for r in (2, 30)
    ]
    assert errors[0] > 5 * errors[1] > 0


def test_parameters_and_bytes_go(folded, teacher_file, tmp_path):
    full = parameter_count(open_model(teacher_file))
    model = open_model(folded(teacher_file, "table", samples="1"))
    modulations = 6 * 2 * 192 * (32 + 1)
    assert parameter_count(model) == full - modulations + 6 * 2 * 192 * STEPS
    (sizes,) = json.loads((tmp_path / "folded.json").read_text())["sizes"]
    assert sizes["parameters"] == full and sizes["modulations"] == modulations
    assert sizes["folded_parameters"] == parameter_count(model) + STEPS  # and the timesteps themselves


def test_a_checkpoint_keeps_what_is_beside_the_transformer(folded, output, tmp_path, make_model):
    head_32 = make_model(attention_head_dim=32, axes_dims_rope=[4, 14, 14])
    tensors = {f"{COMFYUI_PREFIX}{n}": t for n, t in head_32.state_dict().items()} | {"vae.mean": torch.ones(3)}
    write_tensors(tmp_path / "checkpoint.safetensors", tensors)
    path = folded(tmp_path / "checkpoint.safetensors", "table")
    assert torch.equal(output(open_model(path)), output(open_model(tmp_path / "checkpoint.safetensors")))
    assert torch.equal(TensorFile(path).read("vae.mean"), torch.ones(3))
    back = folded(path, "off", base=tmp_path / "checkpoint.safetensors", name="back")
    assert same_files(back, tmp_path / "checkpoint.safetensors")


def test_a_diffusers_folder(folded, output, model, tmp_path):
    model.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    path = folded(tmp_path / "transformer", "table")
    assert torch.equal(output(open_model(path)), output(model))
    back = folded(path, "off", base=tmp_path / "transformer", name="back")
    assert torch.equal(output(open_model(back)), output(model))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors_of(back).items())


def test_a_scaled_fp8_file_keeps_its_precision(folded, output, teacher_file, tmp_path):
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors_of(teacher_file).items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored |= {
                name: (tensor / scale).to(torch.float8_e4m3fn),
                name.removesuffix("weight") + "scale_weight": scale,
            }
        else:
            stored[name] = tensor
    write_tensors(tmp_path / "fp8.safetensors", stored, TensorFile(teacher_file).metadata)
    path = folded(tmp_path / "fp8.safetensors", "table")
    assert torch.equal(output(open_model(path)), output(open_model(tmp_path / "fp8.safetensors")))
    kept = TensorFile(path)
    assert kept.dtype("transformer_blocks.0.attn.to_q.weight") is torch.float8_e4m3fn
    assert kept.dtype("transformer_blocks.0.img_mod.1.weight") is torch.float32
    assert "transformer_blocks.0.img_mod.1.scale_weight" not in kept.keys()
    assert same_files(folded(path, "off", base=tmp_path / "fp8.safetensors", name="back"), tmp_path / "fp8.safetensors")


@pytest.mark.parametrize("variant", ["small", "smallest", "1-2,text:3-4"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_a_standalone(folded, output, exported, form, variant):
    original = exported("ppcl", variant)
    path = folded(original, form)
    ours, theirs = output(open_model(path)), output(open_model(original))
    assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5
    assert same_files(folded(path, "off", base=original, name="back"), original)


@pytest.mark.parametrize("form", ["table", "basis"])
def test_a_bundle_with_its_base(folded, output, exported, teacher_file, tmp_path, form):
    original = exported("bundle")
    path = folded(original, form, base=teacher_file)
    base = tmp_path / "exports" / "folded_base.safetensors"
    for name in VARIANTS:
        ours, theirs = output(open_model(path, name, base)), output(open_model(original, name, teacher_file))
        assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5
        model = open_model(path, name, base)
        stated = Bundle(path).plan.variant(name).parameters
        assert stated is None or stated == parameter_count(model)
    assert same_files(folded(path, "off", base=original, name="back"), original)
    assert Bundle(tmp_path / "exports" / "back.ppcl.safetensors").plan == Bundle(original).plan
    assert same_files(folded(base, "off", base=teacher_file, name="teacher"), teacher_file)


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


def test_a_table_that_lacks_timesteps_asks_its_base(folded, output, teacher_file):
    path = folded(teacher_file, "table", samples="1 3")
    model = open_model(path, base=teacher_file)
    known_timesteps(model, [0.9, 0.75, 0.1])
    assert model.time_text_embed.folding.timesteps.tolist() == pytest.approx([*TIMESTEPS, 0.9, 0.1])
    for t in (0.9, 0.1, *TIMESTEPS):
        for samples in (1, 3):
            assert torch.equal(output(model, samples, t), output(open_model(teacher_file), samples, t))
    with pytest.raises(
        ValueError, match="no timestep 0.9, and no base file is given; it has 1, 0.75, 0.5, 0.25 in float32"
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


def test_a_bundle_and_a_base_that_were_not_folded_together(folded, exported, teacher_file):
    original = exported("bundle")
    path = folded(original, "table", base=teacher_file)
    with pytest.raises(ValueError, match=r"is folded \(table\), .* is not folded: they were not folded together"):
        open_model(path, "small", teacher_file)
    with pytest.raises(ValueError, match="is not folded, .*they were not folded together"):
        open_model(original, "small", path.with_name("folded_base.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "basis", "rank": 0}, "--rank 0 leaves nothing to follow the timestep; use 1 or more"),
        ({"form": "basis", "rank": 32}, "rank .*32.* of 32 inputs saves nothing; fold with --form table"),
        ({"form": "basis", "bound": 0.0}, "--bound 0 is no relative error"),
        ({"form": "basis", "bound": 1e-6}, "no useful rank keeps the error within 1e-06: rank .* fold with form table"),
        ({"form": "table", "steps": "none"}, "--steps 'none': numbers of sampling steps, as '8 20'"),
        ({"form": "table", "timesteps": "7"}, "--timesteps '7': numbers from 0 to 1"),
        ({"form": "table", "samples": "0"}, "--samples '0': whole numbers from 1"),
        ({"form": "table", "name": "../up"}, "letters, digits"),
        ({"form": "off"}, "--form off needs --base, the file that was folded"),
    ],
)
def test_bad_settings_are_one_line(folded, teacher_file, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        folded(teacher_file, **settings)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_folded(folded, teacher_file, exported, tmp_path, make_model, save_model):
    path = folded(teacher_file, "table")
    with pytest.raises(ValueError, match=r"is folded already \(table\); unfold it first"):
        folded(path, "basis")
    with pytest.raises(ValueError, match="was not made by folding a file"):
        folded(teacher_file, "off", base=teacher_file)
    with pytest.raises(ValueError, match="is a bundle: students only; give the full model"):
        folded(exported("bundle"), "table")
    config = {**Weights(teacher_file).config, "guidance_embeds": True}
    write_tensors(tmp_path / "guided.safetensors", tensors_of(teacher_file), {"config": json.dumps(config)})
    with pytest.raises(
        ValueError, match="modulations read the timestep and guidance: only those that read the timestep"
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
    write_tensors(tmp_path / "other.safetensors", tensors, {"config": json.dumps(architecture.tiny_config)})
    for form in ("table", "basis"):
        with pytest.raises(
            ValueError, match=f"other.safetensors is {name}, whose modulations read {reads}: only those that"
        ):
            folded(tmp_path / "other.safetensors", form)


def test_stock_layouts_are_refused(folded, run, teacher_file, tmp_path):
    path = folded(teacher_file, "basis")
    folder = Run(tmp_path / "of_folded")
    write_parts(folder, path)
    with pytest.raises(ValueError, match="the model is folded, for which stock comfyui has no place"):
        export(ExportConfig(model=path, run=folder.folder, layout="comfyui", variant="3-4"))
    original = export(ExportConfig(model=path, run=folder.folder, layout="bundle", name="of_folded"))
    with pytest.raises(ValueError, match="was not made by folding a file, so there are no original weights"):
        folded(original, "off", base=teacher_file)


def test_inspect_says_it(folded, teacher_file, exported, capsys):
    inspect(InspectConfig(path=folded(teacher_file, "table"), json=True))
    assert json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(("{", "")))["folded"] == "table of 4 timesteps"
    inspect(InspectConfig(path=folded(exported("ppcl"), "basis", rank=3)))
    assert "basis of 4 coefficients" in capsys.readouterr().out


def test_by_the_command_line(teacher_file, tmp_path, capsys):
    arguments = ["fold", "--path", str(teacher_file), "--form", "basis", "--rank", "3", "--run", str(tmp_path)]
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


@pytest.fixture(scope="module")
def demo_folded(tmp_path_factory):
    """The bundled teacher's bundle in both forms: (bundle, its base)."""
    made = {"off": (DEMO / "demo.ppcl.safetensors", DEMO / "teacher.safetensors")}
    for form in ("table", "basis"):
        config = FoldConfig(
            path=made["off"][0], base=made["off"][1], form=form, steps="4", dtype="float32", samples="2", device="cpu",
            run=tmp_path_factory.mktemp(form),
        )  # fmt: skip
        path = fold(config)
        made[form] = path, path.with_name("folded_base.safetensors")
    return made


@pytest.mark.parametrize("variant", ["full", "large", "medium", "small", "smallest"])
def test_every_variant_of_the_bundled_teacher(demo_folded, architecture, variant):
    """Two captions, guidance on: a table draws the same bits, a basis of one per cent almost the same picture."""
    codec = open_codec(demo_folded["off"][1])
    prompts = encode_prompts(
        codec, ["a white K on a blue circle, yellow background", "a red 7 on a white hexagon, green background"]
    )
    drawn = {
        form: draw_prompts(architecture, open_model(path, variant, base), prompts, 0, 4, 2.0, 2, form)
        for form, (path, base) in demo_folded.items()
    }
    assert torch.equal(drawn["table"], drawn["off"])
    assert 0 < relative(drawn["basis"], drawn["off"]) < 0.03
    report = json.loads((demo_folded["basis"][0].parents[1] / "folded.json").read_text())
    assert next(row for row in report["curve"] if row["rank"] == report["rank"])["worst"] <= 0.01


def test_a_folded_file_brings_its_codec(demo_folded, tmp_path):
    """`ppcl generate` with nothing else."""
    arguments = [
        "generate",
        "--path",
        str(demo_folded["table"][1]),
        "--prompt",
        "a white K on a blue circle, yellow background",
    ]
    assert (
        main([*arguments, "--steps", "4", "--output", str(tmp_path / "a.png")]) == 0 and (tmp_path / "a.png").exists()
    )
    assert main([*arguments, "--steps", "5", "--output", str(tmp_path / "b.png")]) == 2
    base = ["--base", str(DEMO / "teacher.safetensors")]
    assert main([*arguments, *base, "--steps", "5", "--output", str(tmp_path / "b.png")]) == 0
