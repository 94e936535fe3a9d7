"""Graders answer with the probability of yes, read text, and say how well a picture fits a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_engine.data.graders import open_grader, vision_language
from ppcl_engine.data.graders.rendered_world import RenderedWorldReader, named_in
from ppcl_engine.data.graders.text_reader import TextReader
from ppcl_engine.data.graders.vision_language import VisionLanguageModel
from ppcl_engine.data.rendered.captions import parse_caption, render
from ppcl_engine.system import optional_packages

from ...tiny.benchmark_files import tiny_judge

CAPTION = "a red K on a blue circle, yellow background"


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    (picture,) = render([parse_caption(CAPTION)], torch.Generator().manual_seed(0))
    return Image.fromarray((picture * 255).byte().movedim(0, -1).numpy())


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def judge(request, tmp_path_factory) -> VisionLanguageModel:
    return VisionLanguageModel(tiny_judge(tmp_path_factory.mktemp("judge"), request.param), "cpu")


def test_the_rendered_world_is_read(drawn):
    reader = RenderedWorldReader()
    assert reader.read(drawn) == "K"
    assert reader.ask(drawn, "Is there a blue circle in this picture?") > 0.9
    assert reader.ask(drawn, "Is the circle red?") < 0.1
    assert reader.similarity(drawn, CAPTION) > 0.9


def test_a_colour_is_that_of_the_thing_behind_it_or_before_it():
    background = ("background", "yellow")
    assert named_in(CAPTION)[-1:] == [background] and len(named_in(CAPTION)) == 5
    assert named_in("Is the background yellow?") == [background]
    for question in ("Is the K above the circle?", "Is it red?", "Is there a bench?"):
        with pytest.raises(ValueError, match="cannot judge .*--judge"):
            named_in(question)


def test_the_probability_of_yes_is_among_the_first_tokens_of_both(judge, drawn):
    probability = judge.ask(drawn, "Is there a cat?")
    inputs = judge._inputs(drawn, vision_language.ANSWER.format("Is there a cat?"))
    with torch.no_grad():
        logits = judge._model(**inputs).logits[0, -1]
    encode = judge._tokenizer.encode
    yes, no = (
        [encode(word)[0] for word in words] for words in (vision_language.YES, vision_language.NO)
    )
    shares = logits[[*yes, *no]].softmax(0)
    assert probability == pytest.approx(float(shares[: len(yes)].sum()), abs=1e-6)
    assert int(inputs["mm_token_type_ids"].sum()) == int(inputs["image_grid_thw"].prod()) // 4


def test_the_picture_decides_the_answer(judge, drawn):
    other = Image.fromarray(255 - np.asarray(drawn))
    assert judge.similarity(drawn, CAPTION) != judge.similarity(other, CAPTION)


def test_a_model_writes_what_it_reads(judge, drawn, monkeypatch):
    monkeypatch.setattr(vision_language, "READ_TOKENS", 3)
    assert isinstance(judge.read(drawn), str)
    assert (
        judge.name.startswith(("qwen2_5_vl (", "qwen3_vl (")) and "2 layers, 32 wide" in judge.name
    )


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a 'bert', not a vision-language model"):
        VisionLanguageModel(tmp_path, "cpu")
    with pytest.raises(ValueError, match="has no config.json; name the folder"):
        VisionLanguageModel(tmp_path / "none", "cpu")


def test_without_a_grader_one_line_says_which_and_where_it_is_put(monkeypatch):
    with pytest.raises(ValueError, match="--benchmark dpg needs a judge: put .* with --judge"):
        open_grader({"ask"}, None, False, "dpg", "cpu")

    def missing(module):
        raise ImportError(name=module)

    monkeypatch.setattr(optional_packages, "import_module", missing)
    with pytest.raises(ValueError, match="longtext without --judge needs .*onnxruntime.*ppcl.ocr"):
        open_grader({"read"}, None, False, "longtext", "cpu")
    assert isinstance(open_grader({"ask"}, None, True, "dpg", "cpu"), RenderedWorldReader)


def test_rapidocr_reads_words():
    pytest.importorskip("rapidocr")
    from matplotlib import get_data_path
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 28)
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 30), "FRESH BREWS", fill="black", font=font)
    reader = TextReader("this test")
    assert reader.read(picture) == "FRESH BREWS" and reader.read(Image.new("RGB", (64, 64))) == ""
