"""Every stage through the command line, on a tiny diffusers pipeline folder and on ComfyUI files of
its transformer."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from PIL import Image

from ppcl_engine.__main__ import main
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.pipeline import PipelineCodec
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.stages.assess import evaluate as evaluate_stage
from ppcl_engine.stages.assess import generate as generate_stage
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..tiny.qwen_image_folder import build_tiny_pipeline

CAPTIONS = ["a red cat", "the image of the background", "", "by the sea, text"]
SIZE = ("--height", 32, "--width", 48)
LATENT_SHAPE = (8, 12)
DRAWING = ("--steps", 3, "--guidance", 2.0)
DETECT = ("--remove", 2, "--longest", 3, "--bootstrap", 4)
DISTILL = ("--rounds", 1, "--updates", 2, "--warm-up", 1)


def ppcl(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def prune(model, run) -> None:
    """From a calibration set to trained students without corrections, which every host reads."""
    common = ("--model", model, "--run", run, "--device", "cpu")
    ppcl("probe", *common)
    ppcl("detect", *common, *DETECT)
    ppcl("distill-depth", *common, *DISTILL, "--correction", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture(scope="module")
def run(folder, prompts, tmp_path_factory):
    """A run folder with everything up to the exports in it."""
    run = tmp_path_factory.mktemp("run")
    common = ("--model", folder, "--run", run, "--device", "cpu")
    ppcl("calibrate", *common, "--prompts", prompts, "--samples", 6, "--batch", 2, *SIZE, *DRAWING)
    prune(folder, run)
    ppcl("variants", *common, "--samples", 4)
    for layout in ("bundle", "diffusers", "comfyui"):
        ppcl("export", *common, "--layout", layout, "--name", layout, "--store", "float32")
    return run


@pytest.fixture
def alone(monkeypatch):
    """The VAE finds neither a transformer nor a text encoder in memory; returns the transformers
    that came and went."""
    transformers = []

    def watched(module, name):
        opened = getattr(module, name)

        def open_and_remember(*arguments):
            model = opened(*arguments)
            transformers.append(weakref.ref(model))
            return model

        monkeypatch.setattr(module, name, open_and_remember)

    def checked(name):
        original = getattr(PipelineCodec, name)

        def check(codec, tensor):
            assert codec._text_pipeline is None and all(model() is None for model in transformers)
            return original(codec, tensor)

        monkeypatch.setattr(PipelineCodec, name, check)

    watched(evaluate_stage, "open_variant")
    watched(generate_stage, "open_model")
    checked("pictures")
    checked("latents")
    return transformers


def test_states_lie_on_the_teachers_own_way(run, folder):
    calibration, codec = load_calibration(run / "calibration.safetensors"), open_codec(folder)
    times = torch.cat([batch["timestep"] for batch in calibration.batches])
    rows, columns = (side // 2 for side in LATENT_SHAPE)
    assert (
        calibration.samples == 6
        and calibration.batches[0]["hidden_states"].shape[1] == rows * columns
    )
    schedule = torch.tensor(codec.timesteps(3, rows * columns)[:-1])
    assert all((schedule == t).any() for t in times) and len(times.unique()) > 1


def test_pictures_with_captions_calibrate_one_model_at_a_time(folder, tmp_path, alone):
    images = tmp_path / "images"
    images.mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (40, 30), (60 * i, 20, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(caption)
    common = (
        "--model",
        folder,
        "--run",
        tmp_path,
        "--device",
        "cpu",
        "--images",
        images,
        "--samples",
        4,
        "--batch",
        2,
    )
    ppcl("calibrate", *common, *SIZE)
    calibration = load_calibration(tmp_path / "calibration.safetensors")
    assert calibration.samples == 4 and calibration.batches[1]["clean"].shape == (2, 24, 16)
    ppcl("probe", "--model", folder, "--run", tmp_path, "--device", "cpu")


def test_a_picture_size_that_does_not_divide_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    arguments = [
        "--model",
        folder,
        "--run",
        tmp_path,
        "--images",
        tmp_path / "images",
        "--height",
        32,
        "--width",
        44,
    ]
    assert main(["calibrate", *map(str, arguments)]) == 2
    message = "ppcl: 32 x 44 pixels is not a multiple of 8; change --height and --width"
    assert capsys.readouterr().err.splitlines() == [message]


def test_exports_are_the_bundles_model(run, folder):
    exports = run / "exports"
    bundle = open_model(exports / "bundle.ppcl.safetensors", "small", base=folder)
    architecture = Weights(folder).architecture
    inputs = load_calibration(run / "calibration.safetensors").inputs(0)
    with torch.no_grad():
        expected = architecture.call(bundle, inputs)
        for path in (exports / "diffusers", exports / "comfyui.safetensors"):
            assert Weights(path).num_blocks == 4
            assert torch.equal(architecture.call(open_model(path), inputs), expected)


def test_evaluate(run, folder, prompts, alone):
    common = ("--model", folder, "--run", run, "--device", "cpu", "--prompts", prompts)
    ppcl("evaluate", *common, "--captions", 3, "--batch", 2, "--variants", "small", *SIZE, *DRAWING)
    rows = json.loads((run / "evaluate.json").read_text())["variants"]
    # each is opened again to be timed
    assert [row["name"] for row in rows] == ["full", "small"] and len(alone) == 4
    assert rows[1]["velocity_error"]["value"] > 0 and rows[1]["psnr"]["value"] < 100
    assert rows[1]["character_accuracy"] is None and rows[1]["text_sensitivity"]["value"] > 0
    assert TensorFile(run / "pictures.safetensors").shape("small") == (3, 3, 32, 48)
    assert (run / "report.html").stat().st_size > 10_000


def test_generate_from_every_file(run, folder, tmp_path, alone):
    """The teacher itself, the bundle, and both exports with the folder as what brings text encoder
    and VAE."""
    exports = run / "exports"
    files = {
        "teacher": ("--path", folder),
        "bundle": (
            "--path",
            exports / "bundle.ppcl.safetensors",
            "--base",
            folder,
            "--variant",
            "small",
        ),
        "diffusers": ("--path", exports / "diffusers", "--base", folder),
        "comfyui": ("--path", exports / "comfyui.safetensors", "--base", folder),
    }
    pictures = {}
    for name, arguments in files.items():
        output = tmp_path / f"{name}.png"
        ppcl(
            "generate",
            *arguments,
            "--prompt",
            "a red cat | the sea",
            "--output",
            output,
            "--device",
            "cpu",
            *SIZE,
            *DRAWING,
        )
        pictures[name] = Image.open(output)
    assert len(alone) == 4 and {picture.size for picture in pictures.values()} == {
        (2 * 48 * 8, 32 * 8)
    }
    contents = {name: picture.tobytes() for name, picture in pictures.items()}
    assert contents["bundle"] == contents["diffusers"] == contents["comfyui"] != contents["teacher"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_comfyui_file_and_stored_embeddings(folder, tmp_path, dtype):
    """No pipeline folder at hand: the file brings the transformer alone, the embeddings are made
    elsewhere."""
    weights, codec = Weights(folder), open_codec(folder)
    model, embeddings, run = (
        tmp_path / "comfyui.safetensors",
        tmp_path / "embeddings.safetensors",
        tmp_path / "run",
    )
    write_tensors(
        model,
        {f"model.diffusion_model.{key}": weights.read(key).to(dtype) for key in weights.keys()},
    )
    text, mask = codec.text(CAPTIONS).values()
    write_tensors(
        embeddings, {"text": text, "mask": mask, "empty": codec.text([""])["encoder_hidden_states"]}
    )
    common = (
        "--model",
        model,
        "--run",
        run,
        "--device",
        "cpu",
        "--embeddings",
        embeddings,
        "--height",
        64,
        "--width",
        96,
    )
    ppcl("calibrate", *common, "--samples", 6, "--batch", 2, *DRAWING)
    times = torch.cat(
        [batch["timestep"] for batch in load_calibration(run / "calibration.safetensors").batches]
    )
    assert {round(3 * t) for t in times.tolist()} <= {1, 2, 3} and torch.allclose(
        3 * times, (3 * times).round()
    )
    prune(model, run)
    assert list((run / "depth").glob("*.safetensors"))
