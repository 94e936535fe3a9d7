"""The method through the command line, on a tiny diffusers pipeline folder and on ComfyUI files of
its transformer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ppcl_engine.__main__ import main
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.memory import check_one_model_at_a_time
from ..tiny.qwen_image_folder import CAPTIONS, DRAWING, SIZE, build_tiny_pipeline

LATENT_SHAPE = (8, 12)
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


def test_pictures_with_captions_calibrate_one_model_at_a_time(folder, tmp_path, monkeypatch):
    check_one_model_at_a_time(monkeypatch)
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


@pytest.fixture
def embeddings(folder, tmp_path):
    """Made elsewhere: of the captions, and of none."""
    codec, path = open_codec(folder), tmp_path / "embeddings.safetensors"
    text, mask = codec.text(CAPTIONS).values()
    empty = codec.text([""])["encoder_hidden_states"]
    write_tensors(path, {"text": text, "mask": mask, "empty": empty})
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_comfyui_file_and_stored_embeddings(folder, embeddings, tmp_path, dtype):
    """No pipeline folder at hand: the file brings the transformer alone."""
    weights, model, run = Weights(folder), tmp_path / "comfyui.safetensors", tmp_path / "run"
    tensors = {
        f"model.diffusion_model.{key}": weights.read(key).to(dtype) for key in weights.keys()
    }
    write_tensors(model, tensors)
    common = ("--model", model, "--run", run, "--device", "cpu", "--embeddings", embeddings)
    size = ("--height", 64, "--width", 96)
    ppcl("calibrate", *common, *size, "--samples", 6, "--batch", 2, *DRAWING)
    batches = load_calibration(run / "calibration.safetensors").batches
    times = 3 * torch.cat([batch["timestep"] for batch in batches])
    assert {round(t) for t in times.tolist()} <= {1, 2, 3}
    assert torch.allclose(times, times.round())
    prune(model, run)
    assert list((run / "depth").glob("*.safetensors"))
