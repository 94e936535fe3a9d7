"""Every stage on a tiny random edit model: triples of references, instruction and picture."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from ppcl_engine.__main__ import main
from ppcl_engine.algorithms.detection.width_fits import Fit
from ppcl_engine.algorithms.detection.width_solutions import ridge_solutions
from ppcl_engine.algorithms.distillation.losses import LOSSES, interval_loss
from ppcl_engine.architectures import REFERENCES
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.estimate.needs import needs
from ppcl_engine.jobs.preview import Painter
from ppcl_engine.models.cost import CostModel
from ppcl_engine.models.layout import Place
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, HINTS_TENSOR
from ppcl_engine.models.streaming import StateStore, teacher_velocity
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DetectWidthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
)
from ppcl_engine.stages.inputs import open_teacher
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..tiny.qwen_image_edit_folder import build_tiny_edit_pipeline
from ..tiny.qwen_image_folder import build_tiny_pipeline

NAMES = {"cat": 1, "dog": 2, "sea": 2, "sky": 1}  # pictures, and how many references each has
SIZE = ("--height", 32, "--width", 48)
TOKENS = 4 * 6
MARK = "__index_timestep_zero__"
DRAWING = ("--steps", 2, "--guidance", 2.0)
BEHIND = ((1, 2, 2), (1, 3, 1))  # sizes of references, smaller than the picture


def ppcl(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "pipeline"
    return build_tiny_edit_pipeline(path, "QwenImageEditPlusPipeline", zero_cond_t=True)


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    """A folder of pictures with instructions, and one of their references."""
    base = tmp_path_factory.mktemp("triples")
    pictures, references = base / "pictures", base / "references"
    pictures.mkdir(), references.mkdir()
    for i, (name, count) in enumerate(NAMES.items()):
        Image.new("RGB", (50, 30), (60 * i, 20, 200)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"make the {name} red")
        for n in range(count):
            stem = name if count == 1 else f"{name}_{n + 1}"
            Image.new("RGB", (64, 64), (20, 60 * i, 90 * n)).save(references / f"{stem}.png")
    return pictures, references


@pytest.fixture(scope="module")
def run(folder, triples, tmp_path_factory):
    """A run folder with everything from triples to exports in it."""
    run, (pictures, references) = tmp_path_factory.mktemp("run"), triples
    common = ("--model", folder, "--run", run, "--device", "cpu")
    given = ("--images", pictures, "--references", references, "--samples", 8, "--batch", 2)
    ppcl("calibrate", *common, *given, *SIZE, "--empty-captions", 0.25)
    ppcl("probe", *common)
    ppcl("detect", *common, "--remove", 2, "--longest", 3, "--bootstrap", 4)
    ppcl(
        "distill-depth",
        *common,
        "--rounds",
        1,
        "--updates",
        2,
        "--warm-up",
        1,
        "--correction",
        "none",
    )
    ppcl("variants", *common, "--samples", 4)
    for layout in ("bundle", "diffusers", "comfyui", "ppcl"):
        ppcl("export", *common, "--layout", layout, "--name", layout, "--store", "float32")
    return run


def test_batches_hold_as_many_references_each(run):
    calibration = load_calibration(run / "calibration.safetensors")
    assert calibration.origin["source"] == "images" and calibration.samples == 8
    counts = [len(batch["grid"]) - 1 for batch in calibration.batches]
    assert counts == [1, 2, 1, 2]
    for count, batch in zip(counts, calibration.batches, strict=True):
        assert batch["grid"].tolist() == [[1, 4, 6]] * (1 + count)
        assert batch["hidden_states"].shape == batch["clean"].shape == (2, TOKENS, 16)
        assert batch[REFERENCES].shape == (2, count * TOKENS, 16)
        assert (batch[REFERENCES].std(0) > 0).any()  # of each picture its own
    fresh = calibration.fresh(1, 1)
    assert torch.equal(fresh[REFERENCES], calibration.batches[1][REFERENCES])
    assert not torch.equal(fresh["hidden_states"], calibration.batches[1]["hidden_states"])


def test_exports_are_the_bundles_model(run, folder):
    exports, architecture = run / "exports", Weights(folder).architecture
    bundle = open_model(exports / "bundle.ppcl.safetensors", "small", base=folder)
    inputs = load_calibration(run / "calibration.safetensors").inputs(3)
    assert json.loads((exports / "diffusers" / "config.json").read_text())["zero_cond_t"]
    with torch.no_grad():
        expected = architecture.call(bundle, inputs)
        assert expected.shape == (2, TOKENS, 16)
        for path in (
            exports / "diffusers",
            exports / "comfyui.safetensors",
            exports / "ppcl.safetensors",
        ):
            assert torch.equal(architecture.call(open_model(path), inputs), expected)


def test_a_comfyui_file_says_by_its_mark_that_references_are_as_at_t_0(run, tmp_path):
    """No shape tells, and files that others made bring no configuration."""
    exported = TensorFile(run / "exports" / "comfyui.safetensors")
    for marked in (True, False):
        left_out = {HINTS_TENSOR} if marked else {HINTS_TENSOR, MARK}
        tensors = {
            f"{COMFYUI_PREFIX}{n}": t for n, t in exported.read_all().items() if n not in left_out
        }
        write_tensors(tmp_path / "other.safetensors", tensors)
        weights = Weights(tmp_path / "other.safetensors")
        assert weights.num_blocks == 4 and weights.config.get("zero_cond_t", False) == marked


def test_evaluate_draws_from_references(run, folder, triples):
    common = ("--model", folder, "--run", run, "--device", "cpu", "--references", triples[0])
    ppcl("evaluate", *common, "--captions", 3, "--batch", 2, "--variants", "small", *SIZE, *DRAWING)
    rows = json.loads((run / "evaluate.json").read_text())["variants"]
    assert rows[1]["velocity_error"]["value"] > 0 and rows[1]["text_sensitivity"]["value"] > 0
    assert TensorFile(run / "pictures.safetensors").shape("small") == (3, 3, 32, 48)


def test_generate_draws_from_references(folder, triples, tmp_path):
    pictures, output = triples[0], tmp_path / "drawn.png"
    given = ("--path", folder, "--prompt", "red | blue", "--output", output, "--device", "cpu")
    references = f"{pictures / 'cat'}.png|{pictures / 'dog'}.png"
    ppcl("generate", *given, "--references", references, *SIZE, *DRAWING)
    assert Image.open(output).size == (2 * 48 * 8, 32 * 8)


def test_references_alone_are_drawn_from(folder, triples, tmp_path):
    common = ("--model", folder, "--run", tmp_path, "--device", "cpu", "--references", triples[0])
    ppcl(
        "calibrate", *common, "--samples", 4, "--batch", 3, *SIZE, *DRAWING, "--empty-captions", 0.5
    )
    calibration = load_calibration(tmp_path / "calibration.safetensors")
    assert calibration.origin["source"] == "references" and calibration.samples == 4
    assert [batch[REFERENCES].shape for batch in calibration.batches] == [
        (3, TOKENS, 16),
        (1, TOKENS, 16),
    ]


def test_statistics_count_references_unless_told_not_to(
    make_run, calibration_of, run_stages, teacher_file, tmp_path
):
    """All 13 image tokens of a sample, or the 6 of its picture; and no stage goes on from what
    counted the others."""
    folder, found = (
        make_run(tmp_path / "run", teacher_file, calibration_of(teacher_file, references=BEHIND)),
        [],
    )
    for only in (False, True):
        run = run_stages(teacher_file, folder, "probe", "detect", target_tokens_only=only)
        report = json.loads(TensorFile(run.probe(2)).metadata["report"])
        rows = [report[stream]["rows"] for stream in ("image", "text")]
        found.append((*rows, TensorFile(run.curves).read("cka").nan_to_num()))
    (image, text, curves), (target, same_text, other_curves) = found
    assert (image, target) == (3 * 6 * 13, 3 * 6 * 6) and text == same_text
    assert not torch.equal(curves, other_curves)


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_blocks_loss_counts_references_unless_told_not_to(
    teacher_file, tmp_path, padded_inputs, loss, only
):
    config = ProbeConfig(model=teacher_file, run=tmp_path, device="cpu", target_tokens_only=only)
    target = open_teacher(config).embed(padded_inputs(references=BEHIND))
    image = target.image.clone()
    image[:, 6:] *= -2
    error = float(
        interval_loss(loss, target.with_streams(image, target.text), target, ("image", "text"))
    )
    assert abs(error) < 1e-6 if only else error > 0.1


def test_the_velocity_is_of_the_picture_alone(
    make_run, calibration_of, run_stages, teacher_file, tmp_path, padded_inputs
):
    folder = make_run(
        tmp_path / "run", teacher_file, calibration_of(teacher_file, references=BEHIND)
    )
    run = run_stages(teacher_file, folder, "probe", "detect", "distill_depth")
    common = {"model": teacher_file, "run": folder, "device": "cpu"}
    tuned = {"learning_rate": 1e-3, "save_every": 2}
    polish(PolishConfig(**common, **tuned, steps=2))
    run_stages(teacher_file, folder, "variants")
    finetune(FinetuneConfig(**common, **tuned, steps=2, data=0.5))
    assert {v.name for v in run.load_plan().variants} >= {"small", "small_tuned"}
    teacher = open_teacher(ProbeConfig(**common))
    assert teacher_velocity(teacher, padded_inputs(references=BEHIND)).shape == (6, 6, 16)


def test_width_on_states_with_references(
    make_run, calibration_of, run_stages, teacher_file, tmp_path
):
    """Fits count the 6 tokens of the picture, of the 13 that there are."""
    folder = make_run(
        tmp_path / "run", teacher_file, calibration_of(teacher_file, batches=2, references=BEHIND)
    )
    common = {"model": teacher_file, "run": folder, "device": "cpu", "target_tokens_only": True}
    run = Run(folder)
    teacher = open_teacher(ProbeConfig(**common))
    fit = Fit(place=Place(index=2), kind="ffn_image")
    inputs = load_calibration(run.calibration).all_inputs()
    with torch.no_grad():
        solutions = ridge_solutions(
            teacher,
            RunStudents(run, teacher.config, teacher.architecture),
            inputs,
            [fit],
            StateStore(None),
            1.0,
        )
    assert solutions[fit]["map"].rows == 2 * 6 * 6
    run_stages(teacher_file, folder, "probe", "detect", "distill_depth", target_tokens_only=True)
    detect_width(DetectWidthConfig(**common, share=0.6, samples=6, kinds="ffn_image"))
    distill_width(DistillWidthConfig(**common, rounds=1, updates=2, warm_up=1))
    assert run.load_plan().sites and len(list(run.projections.iterdir())) >= len(
        run.load_plan().sites
    )


def test_a_jobs_pictures_are_drawn_from_the_references(run, folder):
    painter = Painter(ProbeConfig(model=folder, run=run, device="cpu"), lambda: False)
    assert painter.teacher.shape == (2, 3, 32, 48)


def test_references_cost_what_their_tokens_do(
    architecture, padded_inputs, make_run, calibration_of, teacher_file, tmp_path
):
    with_them, without = (
        CostModel.at(architecture, architecture.tiny_config, padded_inputs(references=r))
        for r in (BEHIND, ())
    )
    assert with_them.block(0).flops > 1.5 * without.block(0).flops
    assert with_them.block(0).parameters == without.block(0).parameters
    memory = []
    for name, references in (("with", BEHIND), ("without", ())):
        run = make_run(
            tmp_path / name, teacher_file, calibration_of(teacher_file, references=references)
        )
        memory.append(needs(ProbeConfig(model=teacher_file, run=run, device="cpu")).memory)
    assert memory[0] > memory[1]


@pytest.fixture
def calibrating(folder, tmp_path):
    run = tmp_path / "run"
    return ("calibrate", "--model", folder, "--run", run, "--device", "cpu", "--samples", 4, *SIZE)


def test_pictures_without_references_are_one_line(calibrating, triples, tmp_path, line_of):
    pictures, references = triples
    line = line_of(*calibrating, "--images", pictures)
    assert line.endswith(
        "is an edit model, whose captions change pictures: name them with --references"
    )
    less = tmp_path / "less"
    less.mkdir()
    (less / "cat.png").write_bytes((references / "cat.png").read_bytes())
    line = line_of(*calibrating, "--images", pictures, "--references", less)
    put = "put dog.png there, or dog_1.png and so on"
    assert line == f"ppcl: {less} has no reference of dog.png; {put}"
    line = line_of(*calibrating, "--images", pictures, "--references", tmp_path / "none")
    assert "none holds no pictures" in line
    line = line_of(*calibrating[:-1], 44, "--images", pictures, "--references", references)
    assert line == "ppcl: 32 x 44 pixels is not a multiple of 8; change --height and --width"


def test_references_without_captions_are_one_line(calibrating, triples, tmp_path, line_of):
    pictures, references = triples
    line = line_of(*calibrating, "--references", references)
    assert line.endswith("cat.png has no caption; write it into cat.txt")
    words = tmp_path / "words.txt"
    words.write_text("a cat\n")
    line = line_of(*calibrating, "--references", pictures, "--prompts", words)
    assert "needs one source" in line


def test_a_reference_that_does_not_exist_is_one_line(folder, tmp_path, line_of):
    given = ("--path", folder, "--prompt", "a", "--references", tmp_path / "no.png")
    line = line_of("generate", *given, *SIZE)
    assert line.endswith("no.png does not exist; name the pictures to change with --references")


def test_a_model_that_changes_no_pictures_takes_no_references(triples, tmp_path, line_of):
    plain = build_tiny_pipeline(tmp_path / "plain")
    pictures, references = triples
    given = ("--images", pictures, "--references", references, "--samples", 4, *SIZE)
    line = line_of(
        "calibrate", "--model", plain, "--run", tmp_path / "run", "--device", "cpu", *given
    )
    assert line.endswith(
        "plain draws from text alone here and changes no pictures; leave the references out"
    )
