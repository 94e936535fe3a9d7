"""Calibration from prompts: the words, what the host's own text encoder makes of them, or an edit
model's pictures with their instructions, in a run that any machine can do."""

import shutil

import comfy.sd
import comfy.text_encoders.qwen_image as qwen
import folder_paths
import pytest
import torch
from PIL import Image

from ppcl_engine.architectures import REFERENCES
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system.tensor_files import TensorFile

from ....tiny.qwen_image_edit_folder import build_tiny_edit_pipeline

PROMPTS = "a red fox\n\n  the same fox, at night, in the rain  \n"
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
NODE = {
    "samples": 6,
    "batch": 2,
    "empty_captions": 0.5,
    "steps": 2,
    "guidance": 2.0,
    "height": 128,
    "width": 128,
    "device": "cpu",
    "dtype": "float32",
    "streamed": False,
    "seed": 0,
    "wait": True,
    "start": False,
    "keep_running": False,
}


@pytest.fixture(scope="module")
def clip():
    """The host's text encoder of Qwen-Image, with one small random layer."""

    class Target:
        params = {}
        clip = qwen.te()
        tokenizer = qwen.QwenImageTokenizer

    config = {"qwen25_7b_model_config": {**SMALL, "num_key_value_heads": 1}}
    encoder = comfy.sd.CLIP(Target, model_options={**config, "dtype": torch.float32})
    language = encoder.cond_stage_model.qwen25_7b.transformer
    del language.visual  # hundreds of megabytes that no text goes through
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


@pytest.fixture
def output(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return pack("paths").runs()


def test_a_file_for_each_set_of_prompts(pack):
    prompts = pack("make.prompts").Prompts
    assert prompts(PROMPTS).lines == ["a red fox", "the same fox, at night, in the rain"]
    assert prompts(PROMPTS).file == prompts("a red fox\nthe same fox, at night, in the rain").file
    assert prompts("a red fox").file != prompts(PROMPTS).file
    assert prompts(PROMPTS).file.startswith("prompts-") and len(prompts(PROMPTS).file) == 20
    for text, message in (
        ("\n \n", "0 prompts"),
        ("a\n" * 10_001, "10001 prompts"),
        ("a" * 200_000, "200,000 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts(text)


def test_the_words_are_in_the_run(run_node, output, teacher):
    name, text = run_node(
        "PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, **NODE
    )
    folder = output.path(name)
    ((stage, settings),) = read_spec(folder).stages
    assert (
        stage == "calibrate"
        and (folder / settings["prompts"]).read_text().splitlines()[0] == "a red fox"
    )
    assert text.startswith(f"{name}: not started; about ") and "\npaper: " in text
    other, _ = run_node(
        "PPCL_CalibrateFromPrompts",
        model_file=teacher.name,
        prompts=PROMPTS,
        **{**NODE, "preset": "quick"},
    )
    ((_, settings),) = read_spec(output.path(other)).stages
    assert (settings["samples"], settings["steps"], settings["batch"]) == (24, 10, 2)
    other, _ = run_node(
        "PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts="a blue fox", **NODE
    )
    again, _ = run_node(
        "PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, **NODE
    )
    assert other != name and again == name
    _, text = run_node(
        "PPCL_CalibrateFromPrompts",
        model_file=teacher.name,
        prompts=PROMPTS,
        **{**NODE, "device": "cuda:77"},
    )
    assert "what it takes cannot be told here: device cuda:77 is not on this machine" in text


def test_the_hosts_text_encoder(run_node, output, teacher, clip):
    """What the host would give a sampler is what the teacher draws with."""
    name, _ = run_node(
        "PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, clip=clip, **NODE
    )
    folder = output.path(name)
    ((_, settings),) = read_spec(folder).stages
    stored = TensorFile(folder / settings["embeddings"]).read_all()
    for row, prompt in enumerate(("a red fox", "the same fox, at night, in the rain")):
        with torch.inference_mode():
            expected = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0]
        assert stored["mask"][row].sum() == len(expected)
        assert torch.equal(stored["text"][row, : len(expected)], expected.float())
    assert stored["empty"].shape[0] == 1 and stored["text"].shape[2] == 24
    for stage, config in configs(read_spec(folder), folder):
        run_stage(stage, config)
    calibration = load_calibration(Run(folder).calibration)
    assert calibration.samples == 6 and calibration.origin["source"] == "embeddings"


def test_sizes_are_asked_for(run_node, output, teacher, clip, pack):
    """Embeddings do not say how large pictures are."""
    name, _ = run_node(
        "PPCL_CalibrateFromPrompts",
        model_file=teacher.name,
        prompts=PROMPTS,
        clip=clip,
        **{**NODE, "height": 0},
    )
    folder = output.path(name)
    with pytest.raises(ValueError, match="give --height and --width") as caught:
        for stage, config in configs(read_spec(folder), folder):
            run_stage(stage, config)
    assert (
        pack("make.waiting")
        .in_words_of_widgets(str(caught.value))
        .endswith("give height and width")
    )


@pytest.fixture
def edit_model(models):
    """Name of a tiny edit model's diffusers folder."""
    folder = build_tiny_edit_pipeline(models.diffusion_models / "tiny-edit")
    yield f"{folder.name}/"
    shutil.rmtree(folder)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder in the host's input folder: two pictures with their instructions."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    folder = tmp_path / "input" / "before"
    folder.mkdir(parents=True)
    for i, name in enumerate(("cat", "sea")):
        Image.new("RGB", (48, 40), (90 * i, 20, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"make the {name} red")
    return folder


def test_pictures_and_their_instructions(run_node, output, edit_model, pictures):
    """Copied into the run; others are another run."""
    small = {**NODE, "height": 32, "width": 48, "samples": 3}
    given = {"model_file": edit_model, "prompts": " ", "references": "before", **small}
    name, _ = run_node("PPCL_CalibrateFromPrompts", **given)
    folder = output.path(name)
    ((_, settings),) = read_spec(folder).stages
    assert sorted(p.name for p in (folder / settings["references"]).iterdir()) == [
        "cat.png",
        "cat.txt",
        "sea.png",
        "sea.txt",
    ]
    (pictures / "cat.txt").write_text("make the cat blue")
    assert run_node("PPCL_CalibrateFromPrompts", **given)[0] != name
    for stage, config in configs(read_spec(folder), folder):
        run_stage(stage, config)
    calibration = load_calibration(Run(folder).calibration)
    assert calibration.samples == 3 and calibration.batches[0][REFERENCES].shape == (2, 24, 16)


def test_references_that_cannot_be(run_node, output, teacher, pictures, tmp_path):
    (tmp_path / "secret").mkdir()
    (pictures.parent / "link").symlink_to(tmp_path / "secret")
    given = {"model_file": teacher.name, "prompts": "", **NODE}
    for name in ("../secret", "/etc", "link", "", "before/.."):
        with pytest.raises(
            ValueError,
            match="is not a folder in ComfyUI's input folder; refresh, then choose again",
        ):
            run_node("PPCL_CalibrateFromPrompts", references=name, **given)
    with pytest.raises(ValueError, match="leave prompts empty and clip unconnected"):
        run_node("PPCL_CalibrateFromPrompts", references="before", **{**given, "prompts": "a fox"})
    (pictures / "sea.txt").unlink()
    with pytest.raises(ValueError, match="sea.png has no caption; write it into sea.txt"):
        run_node("PPCL_CalibrateFromPrompts", references="before", **given)
