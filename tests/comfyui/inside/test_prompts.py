"""Calibration from prompts: the words, or what the host's own text encoder makes of them, in a run that any machine can do."""

import comfy.sd
import comfy.text_encoders.qwen_image as qwen
import folder_paths
import pytest
import torch

from ppcl_engine.__main__ import run_stage
from ppcl_engine.data import load_calibration
from ppcl_engine.files import TensorFile
from ppcl_engine.jobs.order import configs, read_order
from ppcl_engine.run import Run

PROMPTS = "a red fox\n\n  the same fox, at night, in the rain  \n"
SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
NODE = {
    "samples": 6, "batch": 2, "empty_captions": 0.5, "steps": 2, "guidance": 2.0, "height": 128, "width": 128, "device": "cpu",
    "dtype": "float32", "streamed": False, "seed": 0, "wait": True, "start": False, "keep_running": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    """The host's text encoder of Qwen-Image, with one small random layer."""

    class Target:
        params = {}
        clip = qwen.te()
        tokenizer = qwen.QwenImageTokenizer

    config = {"qwen25_7b_model_config": {**SMALL, "num_key_value_heads": 1}}
    found = comfy.sd.CLIP(Target, model_options={**config, "dtype": torch.float32})
    language = found.cond_stage_model.qwen25_7b.transformer
    del language.visual  # hundreds of megabytes that no text goes through
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture
def output(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return pack("paths").runs()


def test_a_file_for_each_set_of_prompts(pack):
    prompts = pack("prompts").Prompts
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
    name, text = run_node("PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, **NODE)
    folder = output.path(name)
    ((stage, settings),) = read_order(folder).stages
    assert stage == "calibrate" and (folder / settings["prompts"]).read_text().splitlines()[0] == "a red fox"
    assert text == f"{name}: queued"
    other, _ = run_node("PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts="a blue fox", **NODE)
    again, _ = run_node("PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, **NODE)
    assert other != name and again == name


def test_the_hosts_text_encoder(run_node, output, teacher, clip):
    """What the host would give a sampler is what the teacher draws with."""
    name, _ = run_node("PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, clip=clip, **NODE)
    folder = output.path(name)
    ((_, settings),) = read_order(folder).stages
    stored = TensorFile(folder / settings["embeddings"]).read_all()
    for row, prompt in enumerate(("a red fox", "the same fox, at night, in the rain")):
        with torch.inference_mode():
            expected = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0]
        assert stored["mask"][row].sum() == len(expected)
        assert torch.equal(stored["text"][row, : len(expected)], expected.float())
    assert stored["empty"].shape[0] == 1 and stored["text"].shape[2] == 24
    for stage, config in configs(read_order(folder), folder):
        run_stage(stage, config)
    calibration = load_calibration(Run(folder).calibration)
    assert calibration.samples == 6 and calibration.origin["source"] == "embeddings"


def test_sizes_are_asked_for(run_node, output, teacher, clip, pack):
    """Embeddings do not say how large pictures are."""
    name, _ = run_node(
        "PPCL_CalibrateFromPrompts", model_file=teacher.name, prompts=PROMPTS, clip=clip, **{**NODE, "height": 0}
    )
    folder = output.path(name)
    with pytest.raises(ValueError, match="give --height and --width") as caught:
        for stage, config in configs(read_order(folder), folder):
            run_stage(stage, config)
    assert pack("waiting").in_words_of_widgets(str(caught.value)).endswith("give height and width")
