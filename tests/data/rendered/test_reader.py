"""The bundled reader reads rendered pictures; captions and the codec go there and back."""

import pytest
import torch

from ppcl_engine.data.rendered.captions import caption_table, parse_caption, random_captions, render
from ppcl_engine.data.rendered.reader import BUNDLED, load_reader, read, score
from ppcl_engine.data.rendered.tables import fit_codec


@pytest.fixture(scope="module")
def codec():
    return fit_codec(seed=0)


@pytest.fixture(scope="module")
def world():
    """300 captions and their pictures, of a seed that neither training nor the reported accuracy
    used."""
    generator = torch.Generator().manual_seed(987_654_321)
    captions = random_captions(300, generator)
    return captions, render(captions, generator)


def test_bundled_reader_reads_pictures_that_went_through_the_codec(codec, world):
    captions, pictures = world
    readings = read(load_reader(), codec.pictures(codec.latents(pictures)))
    scores = score(readings, captions)
    assert readings.dtype == torch.int64 and readings.shape == (300, 5)
    assert all(right.dtype == torch.bool and right.shape == (300,) for right in scores.values())
    assert all(right.double().mean() >= 0.99 for right in scores.values())


def test_readings_have_the_columns_of_the_caption_table(world):
    captions, pictures = world
    right = read(load_reader(), pictures) == caption_table(captions)
    assert (right.double().mean(dim=0) >= 0.99).all()


def test_score_counts_each_field_where_it_belongs(world):
    captions = world[0][:5]
    readings = caption_table(captions)
    readings[range(5), range(5)] += 1  # row i is wrong in field i
    scores = {name: right.tolist() for name, right in score(readings, captions).items()}
    assert scores["character"] == [False, True, True, True, True]
    assert scores["shape"] == [True, True, False, True, True]
    assert scores["colour"] == [True, False, True, False, False]
    with pytest.raises(ValueError, match="4 readings"):
        score(readings[:4], captions)


def test_bundled_weights_are_small():
    assert BUNDLED.stat().st_size < 1_000_000
    assert sum(p.numel() for p in load_reader().parameters()) < 400_000


def test_captions_round_trip(world):
    captions = world[0]
    assert [parse_caption(caption.text()) for caption in captions] == captions
    with pytest.raises(ValueError, match="of the form"):
        parse_caption("a red K on a blue triangle, yellow background")


def test_codec_round_trips_with_unit_variance(codec, world):
    pictures = world[1]
    latents = codec.latents(pictures)
    error = (codec.pictures(latents) - pictures).square().mean().sqrt()
    assert latents.shape == (300, 16, 12, 12)
    assert latents.var().item() == pytest.approx(1, abs=0.1)
    assert error < 0.05
