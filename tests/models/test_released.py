"""The authors' released folders compute what the method says, and broken ones end in one clear
line."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.models.released import (
    Released,
    is_width_pruned,
    published_intervals,
    released_layout,
    repeated_steps_warning,
    stored_tensors,
    teacher_indices,
)
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import parse_intervals
from ppcl_engine.stages.assess.inspect import describe

from ..tiny.released_models import (
    FFN,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    TEXT,
    WEIGHTS,
    plant,
    reference,
    released_state,
    write_folder,
)

TEXT_10B, FFN_10B = (37, 41, 51, 52, 54, 56, 58, 59), (2, 58, 59)


@pytest.fixture(scope="module")
def teacher(make_model):
    return make_model(num_layers=TEACHER_BLOCKS)


@pytest.fixture
def config(architecture):
    return architecture.with_blocks(architecture.tiny_config, KEPT)


@pytest.fixture
def expected(make_model, padded_inputs):
    """Computes a released state's output by the formulas."""

    def compute(state: dict, lists: dict, legacy: bool = False) -> torch.Tensor:
        return reference(make_model(num_layers=len(KEPT)), state, lists, padded_inputs(2), legacy)

    return compute


@pytest.fixture
def velocity(architecture, padded_inputs):
    return lambda *path, **options: architecture.call(
        open_model(*path, **options), padded_inputs(2)
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("lists", [TEXT, FFN, LISTS], ids=["text", "ffn", "both"])
def test_a_width_pruned_folder_computes_the_method(
    tmp_path, teacher, config, expected, velocity, lists
):
    state = released_state(teacher, KEPT, lists)
    folder = write_folder(tmp_path, state, config, lists)
    ours, theirs = velocity(folder), expected(state, lists)
    assert close(ours, theirs) and theirs.std() > 0.1
    other = {
        n: t + 1 if "_proj.bias" in n and "to_add_out" not in n else t for n, t in state.items()
    }
    assert not close(ours, expected(other, lists))


def test_a_depth_pruned_folder_is_a_plain_one(tmp_path, teacher, config, expected, velocity):
    nothing = dict.fromkeys(LISTS, [])
    state = released_state(teacher, KEPT, nothing)
    for lists in (None, nothing):
        folder = write_folder(tmp_path / str(lists is None), state, config, lists)
        assert close(velocity(folder), expected(state, nothing))
    assert (
        Weights(tmp_path / "True").num_blocks == Released(tmp_path / "True").num_blocks == len(KEPT)
    )


@pytest.mark.parametrize("kind", ["safetensors sharded", "bin", "bin sharded"])
@pytest.mark.parametrize("lists", [None, LISTS], ids=["plain", "width-pruned"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_container_holds_the_same_model(
    tmp_path, teacher, config, velocity, kind, lists, prefix
):
    state = released_state(teacher, KEPT, lists or dict.fromkeys(LISTS, []))
    plain = write_folder(tmp_path / "plain", state, config, lists)
    folder = write_folder(
        tmp_path / "a" / "transformer",
        {prefix + n: t for n, t in state.items()},
        config,
        lists,
        kind,
    )
    (tmp_path / "a" / "model_index.json").write_text("{}")
    assert torch.equal(velocity(folder), velocity(plain))
    assert torch.equal(velocity(tmp_path / "a"), velocity(plain))


def test_both_meanings_of_a_text_projection(tmp_path, teacher, config, expected, velocity):
    state = released_state(teacher, KEPT, LISTS)
    folder = write_folder(tmp_path, state, config, LISTS)
    legacy = velocity(folder, legacy_txt_proj=True)
    assert close(legacy, expected(state, LISTS, legacy=True))
    assert not close(legacy, velocity(folder))


def test_the_text_passes_a_group_without_a_step(tmp_path, teacher, config, expected, velocity):
    lists = {**LISTS, "ehs_proj_index": []}
    state = released_state(teacher, KEPT, lists)
    assert close(velocity(write_folder(tmp_path, state, config, lists)), expected(state, lists))


def test_legacy_means_something_for_width_pruned_folders_only(
    tmp_path, teacher, config, teacher_file
):
    plain = write_folder(
        tmp_path / "a", released_state(teacher, KEPT, dict.fromkeys(LISTS, [])), config, None
    )
    ffn = write_folder(tmp_path / "b", released_state(teacher, KEPT, FFN), config, FFN)
    for path in (plain, teacher_file, ffn):
        with pytest.raises(ValueError, match="--legacy-txt-proj has no effect"):
            open_model(path, legacy_txt_proj=True)
    text = write_folder(tmp_path / "c", released_state(teacher, KEPT, TEXT), config, TEXT)
    with pytest.raises(ValueError, match="is not a bundle, so it has no variant 'small'"):
        open_model(text, "small", legacy_txt_proj=True)
    with pytest.raises(ValueError, match="is not a folder"):
        Released(teacher_file)


def broken_missing_shard(folder, state, config):
    write_folder(folder, state, config, LISTS, "safetensors sharded")
    (folder / f"{WEIGHTS}-00002-of-00003.safetensors").unlink()


def broken_state(change, folder, state, config):
    change(state)
    write_folder(folder, state, config, LISTS)


def broken_lists(lists, folder, state, config):
    write_folder(folder, state, config, {**LISTS, **lists})


class Trap:
    """Unpickled without care it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_pickle(folder, state, config):
    write_folder(
        folder, state | {"transformer_blocks.0.x": Trap(folder / "trapped")}, config, LISTS, "bin"
    )


def broken_end(folder, state, config):
    path = write_folder(folder, state, config, LISTS, "bin") / f"{WEIGHTS}.bin"
    path.write_bytes(path.read_bytes()[:-200])


BROKEN = {
    "missing shard": (broken_missing_shard, "lacks the shard .*00002-of-00003.safetensors"),
    "missing": (
        partial(broken_state, lambda s: s.pop("transformer_blocks.1.txt_proj.bias")),
        "lacks 1 tensors, first transformer_blocks.1.txt_proj.bias",
    ),
    "unknown": (
        partial(
            broken_state,
            lambda s: s.update({"transformer_blocks.1.txt_mlp.net.2.bias": torch.ones(32)}),
        ),
        "has 1 tensors that the model does not have, first transformer_blocks.1.txt_mlp.net.2.bias",
    ),
    "shape": (
        partial(
            broken_state,
            lambda s: s.update({"transformer_blocks.2.img_mod.1.bias": torch.ones(192)}),
        ),
        re.escape("transformer_blocks.2.img_mod.1.bias has shape (192,), not (96,)"),
    ),
    "lists of another": (
        partial(broken_lists, {"ffn_proj_index": [3, 5]}),
        "lacks 12 tensors, first transformer_blocks.2.img_mlp",
    ),
    "no such block": (
        partial(broken_lists, {"ffn_proj_index": [6]}),
        re.escape("[6] is not a list of blocks 0-5"),
    ),
    "no list": (partial(broken_lists, {"ffn_proj_index": "2"}), "'2' is not a list of blocks 0-5"),
    "step without text": (
        partial(broken_lists, {"ehs_proj_index": [3]}),
        "block 3 is in ehs_proj_index but not in single_stream",
    ),
    "first block": (
        partial(broken_lists, {"single_stream_index": [0, 1, 4, 5]}),
        "block 0 is in single_stream_index, but there is no full block before it",
    ),
    "code in a pickle": (broken_pickle, "holds code or objects, not tensors alone"),
    "truncated pickle": (broken_end, "is truncated or not a PyTorch file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_ends_in_one_line(tmp_path, teacher, config, capsys, case):
    make, message = BROKEN[case]
    make(tmp_path / "folder", released_state(teacher, KEPT, LISTS), config)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "folder")
    assert main(["inspect", "--path", str(tmp_path / "folder")]) == USER_ERROR
    output = capsys.readouterr()
    assert re.search(message, output.err) and len(output.err.splitlines()) == 1 and not output.out
    assert not (tmp_path / "folder" / "trapped").exists()


def test_a_pickle_of_more_than_tensors(tmp_path, teacher, config):
    state = released_state(teacher, KEPT, LISTS)
    write_folder(tmp_path, {"state_dict": state, "step": 3}, config, LISTS, "bin")
    with pytest.raises(ValueError, match="save the model's state_dict alone"):
        open_model(tmp_path)


def test_a_width_pruned_model_is_no_teacher(tmp_path, teacher, config):
    write_folder(tmp_path, released_state(teacher, KEPT, LISTS), config, LISTS)
    with pytest.raises(ValueError, match="is width-pruned .single_stream_index .*`ppcl import`"):
        Weights(tmp_path)


def test_repeated_text_steps_are_named(tmp_path, teacher, config):
    state = released_state(teacher, KEPT, LISTS)
    sound = Released(write_folder(tmp_path / "a", state, config, LISTS))
    assert sound.repeated_steps == [] and repeated_steps_warning(sound) is None
    folder = write_folder(tmp_path / "b", plant(state), config, LISTS)
    assert "blocks 1 5 share one text step" in repeated_steps_warning(Released(folder))
    assert "blocks 1 7 share one text step" in repeated_steps_warning(Released(folder), KEPT)
    with pytest.warns(UserWarning, match="blocks 1 5 share one text step.*--refit"):
        open_model(folder)


def test_the_published_blocks(architecture, tmp_path):
    full = architecture.model_configs["qwen_image"]
    intervals = published_intervals(architecture, architecture.with_blocks(full, range(35)))
    kept = teacher_indices(35, intervals)
    assert (
        kept == sorted(set(range(60)) - {b for i in intervals for b in i.blocks[1:]})
        and len(kept) == 35
    )
    assert published_intervals(architecture, architecture.with_blocks(full, range(40))) is None
    tiny = architecture.with_blocks(architecture.tiny_config, range(35))
    assert published_intervals(architecture, tiny) is None
    assert published_intervals(architecture, tiny, 60) == intervals
    assert teacher_indices(6, parse_intervals("1-2 5-6")) == KEPT


def full_size_lists(
    kept: list[int], text=TEXT_10B, ffn=FFN_10B, steps=(37, 41, 59)
) -> dict[str, list[int]]:
    blocks = {"single_stream_index": text, "ehs_proj_index": steps, "ffn_proj_index": ffn}
    return {name: [kept.index(block) for block in chosen] for name, chosen in blocks.items()}


@pytest.mark.parametrize("size, billions", [("12B", 11.93), ("10B", 10.60)])
def test_the_released_sizes(architecture, size, billions):
    config = architecture.with_blocks(architecture.model_configs["qwen_image"], range(35))
    kept = teacher_indices(35, published_intervals(architecture, config))
    lists = full_size_lists(kept) if size == "10B" else {}
    layout = released_layout(architecture, {**config, **lists}, size)
    names, shapes, unused = stored_tensors(architecture, config, layout)
    parameters = sum(map(math.prod, shapes.values()))
    assert len(set(names.values())) == len(names)
    assert len(unused) == (16 if size == "10B" else 0)
    parameters += (3072 * 3072 + 3072) * len(unused) // 2
    assert round(parameters / 1e9, 2) == billions


def test_what_marks_a_folder(tmp_path, teacher, config, teacher_file):
    state = released_state(teacher, KEPT, LISTS)
    assert is_width_pruned(write_folder(tmp_path / "a", state, config, LISTS))
    assert not is_width_pruned(write_folder(tmp_path / "b", state, config, None))
    assert not is_width_pruned(teacher_file) and not is_width_pruned(tmp_path / "absent")
    assert "teacher_blocks" not in describe(teacher_file)
