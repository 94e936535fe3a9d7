"""Pictures as people have them: upright, over white, in eight bits; what cannot be read is named in
one line."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.data.photos import ORIENTATION, READ, read_picture
from ppcl_engine.data.picture_files import load_pictures, picture_files
from ppcl_engine.demo.bundled import TEACHER

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
TURNS = [
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
]
"""What a camera does to a picture before it writes orientation 1, 2, ... 8"""
DAMAGES = 300


def scene(width: int = 6, height: int = 4) -> Image.Image:
    """No two corners alike."""
    picture = Image.new("RGB", (width, height), (40, 80, 120))
    for place, colour in {(0, 0): RED, (width - 1, 0): GREEN, (0, height - 1): BLUE}.items():
        picture.putpixel(place, colour)
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
def test_a_photo_is_turned_as_the_camera_was_held(tmp_path, orientation, ending):
    stored = scene().transpose(TURNS[orientation - 1]) if orientation > 1 else scene()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(
        tmp_path / f"a{ending}", exif=exif, **({"lossless": True} if ending == ".webp" else {})
    )
    assert np.array_equal(np.asarray(read_picture(tmp_path / f"a{ending}")), np.asarray(scene()))


def declared(mode: str) -> Image.Image:
    """One colour is declared transparent."""
    dark, clear = {"RGB": ((0, 0, 0), (7, 7, 7)), "P": (0, 1)}.get(mode, (0, 7))
    stored = Image.new(mode, (3, 1), dark)
    if mode == "P":
        stored.putpalette([0, 0, 0, 9, 9, 9])
    stored.putpixel((1, 0), clear)
    stored.info["transparency"] = clear
    return stored


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_shows_white_and_no_hidden_colour(tmp_path, mode):
    picture = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))  # black, hidden
    stored = picture.convert(mode) if mode.endswith("A") else declared(mode)
    stored.save(tmp_path / "a.png")
    pixels = np.asarray(read_picture(tmp_path / "a.png"))[0]
    assert pixels.tolist() == [[0, 0, 0], [255, 255, 255], [0, 0, 0]]


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (1, 1), (200, 0, 100, 128)).save(tmp_path / "a.webp", lossless=True)
    (red, green, blue), share = (
        np.asarray(read_picture(tmp_path / "a.webp"))[0, 0].tolist(),
        128 / 255,
    )
    assert (red, green, blue) == pytest.approx(
        (200 * share + 255 * (1 - share), 255 * (1 - share), 100 * share + 255 * (1 - share)), abs=1
    )


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_of_grey_keep_their_greys(tmp_path, ending):
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{ending}")
    assert np.asarray(read_picture(tmp_path / f"a{ending}"))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_values_whose_white_nobody_knows_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=r"a.tif cannot be read as a picture \(its values have 32 bits"
    ):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", READ)
def test_every_ending_is_read(tmp_path, ending):
    scene(64, 48).save(tmp_path / f"a{ending.upper()}")
    (tmp_path / "a.txt").write_text("a scene\n")
    assert [path.suffix for path, _ in picture_files(tmp_path)] == [ending.upper()]
    expected = torch.from_numpy(np.array(scene(64, 48))).movedim(-1, 0) / 255
    assert (
        load_pictures([tmp_path / f"a{ending.upper()}"], (48, 64))[0] - expected
    ).abs().mean() < 0.02


def test_hidden_files_are_left_out_and_others_are_said(tmp_path, capsys):
    for name in ("a.png", "._a.png", ".hidden.jpg"):
        scene().save(tmp_path / name) if name == "a.png" else (tmp_path / name).write_bytes(
            b"Mac OS X"
        )
    (tmp_path / "a.txt").write_text("a scene")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path, _ in picture_files(tmp_path)] == ["a.png"]
    assert capsys.readouterr().err == ""
    (tmp_path / "b.heic").write_bytes(b"x"), (tmp_path / "c.gif").write_bytes(b"x")
    picture_files(tmp_path)
    assert (
        capsys.readouterr().err
        == f"{tmp_path}: b.heic and 1 more left out; read are {' '.join(READ)}\n"
    )


def huge_png(path: Path, side: int) -> Path:
    """Its header alone says how large it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture
def calibrate_line(tmp_path, capsys):
    """What calibrate says of a folder with this picture."""

    def run(picture: Path) -> str:
        picture.with_suffix(".txt").write_text("a red K on a blue circle, yellow background")
        options = ["--images", picture.parent, "--samples", 2, "--device", "cpu"]
        assert (
            main(
                [
                    str(a)
                    for a in ["calibrate", "--model", TEACHER, "--run", tmp_path / "run", *options]
                ]
            )
            == USER_ERROR
        )
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("ppcl:")
        ]
        return line

    (tmp_path / "images").mkdir()
    return run


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, calibrate_line):
    line = calibrate_line(huge_png(tmp_path / "images" / "wall.png", 20_000))
    assert (
        line
        == f"ppcl: {tmp_path / 'images' / 'wall.png'} has 400 megapixels, more than the 179 that are read; make it smaller"
    )


def test_a_large_picture_is_read_without_a_warning(tmp_path, recwarn):
    with pytest.raises(ValueError, match="wall.png cannot be read as a picture"):
        read_picture(huge_png(tmp_path / "wall.png", 10_000))
    assert not recwarn.list


def test_a_broken_picture_is_named(tmp_path, calibrate_line):
    path = tmp_path / "images" / "a.png"
    scene(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:60])
    line = calibrate_line(path)
    assert line.startswith(f"ppcl: {path} cannot be read as a picture (") and line.endswith(
        "save it again, or take it out"
    )
    path.write_text("no picture at all")
    assert f"{path} cannot be read as a picture" in calibrate_line(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_random_damage_is_a_picture_or_one_line(tmp_path, form, capfd):
    """Cuts and flipped bytes."""
    content, rng, path = io.BytesIO(), random.Random(form), tmp_path / "a.png"
    scene(24, 24).save(content, form)
    for _ in range(DAMAGES):
        damaged = bytearray(content.getvalue())
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.3 else damaged)
        try:
            assert read_picture(path).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_a_broken_picture_is_named_before_anything_is_encoded(tmp_path, line_of):
    scene(64, 64).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a red K on a blue circle, yellow background")
    given = ["--images", tmp_path, "--samples", 2, "--device", "cpu", "--run", tmp_path / "run"]
    line = line_of("calibrate", "--model", TEACHER, *given)
    assert line.startswith(f"ppcl: {tmp_path / 'b.png'} cannot be read as a picture")
