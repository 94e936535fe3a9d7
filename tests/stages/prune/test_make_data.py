"""`ppcl data` keeps what the teacher draws in shards, goes on where it stopped, and calibrate reads
them."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.data.calibration import CLEAN, load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.pairs import read_pairs
from ppcl_engine.data.sampling import draw_prompts, encode_prompts
from ppcl_engine.data.shards import shard_files, write_shard
from ppcl_engine.demo.bundled import TEACHER, TEACHERS, render_pictures
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.prune_settings import CalibrateConfig, DataConfig
from ppcl_engine.stages.prune import make_data as stage
from ppcl_engine.stages.prune.calibrate import calibrate
from ppcl_engine.stages.prune.make_data import make_data
from ppcl_engine.system import distributed
from ppcl_engine.system.distributed import Processes

TEXTS = [
    "a red K on a blue circle, yellow background",
    "a white 7 on a black square, green background",
    "a green B on a red hexagon, white background",
]


def config(folder, teacher=TEACHER, **changes) -> DataConfig:
    (folder / "captions.txt").write_text("\n".join(TEXTS) + "\n")
    given = {"prompts": folder / "captions.txt", "out": folder / "shards", "device": "cpu"}
    tiny = {"shard": 2, "batch": 2, "steps": 2, "guidance": 2.0, "store": "float32"}
    return DataConfig(teacher=teacher, **{**given, **tiny, **changes})


def pairs_of(pattern, teacher=TEACHER) -> list[dict]:
    weights = Weights(teacher)
    return read_pairs(shard_files(str(pattern)), weights.architecture, weights.config, 99)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module", params=["qwen", "flux"])
def made(request, tmp_path_factory):
    """(folder, pattern of the shards, the teacher)"""
    folder, teacher = tmp_path_factory.mktemp("data"), TEACHERS[request.param]
    return folder, make_data(config(folder, teacher)), teacher


def test_the_pairs_are_what_the_teacher_draws(made):
    folder, pattern, teacher = made
    assert sorted(content(folder)) == ["00000.tar", "00001.tar", "empty.safetensors", "pairs.json"]
    pairs = pairs_of(pattern, teacher)
    architecture, codec = Weights(teacher).architecture, open_codec(teacher)
    drawn = draw_prompts(
        architecture, open_model(teacher), encode_prompts(codec, TEXTS), 0, 2, 2.0, 3, "draw"
    )
    torch.testing.assert_close(torch.stack([p["latents"] for p in pairs]), drawn, rtol=0, atol=1e-4)
    text = codec.text(TEXTS[:1])["encoder_hidden_states"][0]
    assert torch.equal(pairs[0]["encoder_hidden_states"], text)


def test_calibrate_reads_them(made, tmp_path):
    _, pattern, teacher = made
    given = {"model": teacher, "run": tmp_path, "device": "cpu", "shards": str(pattern)}
    calibration = load_calibration(
        calibrate(CalibrateConfig(**given, samples=6, batch=3, empty_captions=0.5))
    )
    first, second = calibration.batches
    assert torch.equal(first[CLEAN], second[CLEAN])  # three pairs, used twice
    latents = torch.stack([pair["latents"] for pair in pairs_of(pattern, teacher)])
    assert torch.equal(first[CLEAN], Weights(teacher).architecture.pack(latents))


def test_a_stopped_run_goes_on_to_the_same_bits(made, tmp_path, monkeypatch):
    folder, pattern, teacher = made
    if teacher != TEACHER:
        pytest.skip("shown once")
    drawn, kept = [], stage.draw_rows
    monkeypatch.setattr(
        stage,
        "draw_rows",
        lambda *given: drawn.append(1) or (kept(*given) if drawn[1:] == [] else 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        make_data(config(tmp_path))
    assert (tmp_path / "shards" / "00000.tar").exists()
    monkeypatch.setattr(stage, "draw_rows", kept)
    make_data(config(tmp_path))
    assert content(tmp_path) == content(folder)
    with pytest.raises(ValueError, match="made otherwise .guidance differs.; give another --out"):
        make_data(config(tmp_path, guidance=3.0))


def test_processes_share_the_shards(tmp_path):
    for rank in (1, 0):
        with distributed._working(Processes(rank=rank, count=2, share=DataConfig.parallel)):
            make_data(config(tmp_path))
        assert len(list((tmp_path / "shards").glob("*.tar"))) == (1 if rank else 2)


def test_pictures_in_shards_are_pictures_in_a_folder(tmp_path):
    folder = render_pictures(tmp_path / "pictures", 3, seed=1)
    rows = [
        (path.stem, {"txt": path.with_suffix(".txt").read_bytes(), "png": path.read_bytes()})
        for path in sorted(folder.glob("*.png"))
    ]
    write_shard(tmp_path / "00.tar", rows[:2])
    write_shard(tmp_path / "01.tar", rows[2:])
    common = {"model": TEACHER, "device": "cpu", "samples": 4, "batch": 2}
    shards = f"{tmp_path}/{{00..01}}.tar"
    one, other = (
        load_calibration(calibrate(CalibrateConfig(**common, run=tmp_path / name, **source)))
        for name, source in (("a", {"images": folder}), ("b", {"shards": shards}))
    )
    for batch, same in zip(one.batches, other.batches, strict=True):
        assert all(torch.equal(tensor, same[name]) for name, tensor in batch.items())
    assert not (tmp_path / "b" / "states" / "calibrate").exists()


WRONG = {
    "nothing": ("none/{00..99}.tar", [], "matches no file"),
    "empty": ("00.tar", [], "00.tar is empty"),
    "no caption": ("00.tar", [("a", {"png": b"1"})], "00.tar, a has no caption"),
    "another model's": (
        "00.tar",
        [("a", {"safetensors": b"12", "txt": b"a"})],
        "00.tar, a.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("pattern, rows, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_shards_is_one_line(error_of, tmp_path, pattern, rows, message):
    write_shard(tmp_path / "00.tar", rows)
    common = ("--model", TEACHER, "--run", tmp_path / "run", "--device", "cpu")
    assert message in error_of("calibrate", *common, "--shards", tmp_path / pattern, "--samples", 2)


def test_without_the_empty_caption_it_is_named(made, tmp_path, error_of):
    folder, _, teacher = made
    shard = tmp_path / "00000.tar"
    shard.write_bytes((folder / "shards" / shard.name).read_bytes())
    common = ("--model", teacher, "--run", tmp_path / "run", "--device", "cpu", "--shards", shard)
    assert "empty.safetensors does not exist" in error_of(
        "calibrate", *common, "--empty-captions", 1.0, "--samples", 2
    )
