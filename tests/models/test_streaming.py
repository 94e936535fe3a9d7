"""Blocks and states from disk or from memory: the same order, the same bits, the same files."""

import json
import os
from dataclasses import replace

import pytest
import torch

from ppcl_engine.models.streaming import StateStore, Teacher, sweep
from ppcl_engine.models.weights import Weights

STAGES = ("probe", "detect", "distill_depth", "variants")


@pytest.fixture(scope="module", params=[False, True], ids=["resident", "streamed"])
def teacher(request, teacher_file):
    return Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=request.param)


def marks(walk) -> list[tuple[int, float]]:
    return [(index, float(block.img_mod[1].bias[0])) for index, block in walk]


def test_the_walk_is_in_order_with_the_right_blocks(teacher, model):
    expected = [
        (i, float(block.img_mod[1].bias[0])) for i, block in enumerate(model.transformer_blocks)
    ]
    assert len({mark for _, mark in expected}) == 6
    assert marks(teacher.walk(0, 5)) == expected
    assert marks(teacher.walk(2, 2)) == expected[2:3]
    assert marks(teacher.blocks([4, 0, 2])) == [expected[4], expected[0], expected[2]]
    assert marks(teacher.blocks([])) == []
    first = next(iter(teacher.walk(1, 4)))
    assert marks([first]) == [expected[1]]


def test_a_resident_teacher_keeps_its_blocks_and_a_streamed_one_does_not(teacher):
    assert (teacher.block(3) is teacher.block(3)) != teacher.streamed


def test_the_whole_walk_is_the_model(teacher, architecture, model, padded_inputs):
    inputs = padded_inputs()
    state = teacher.embed(inputs)
    for _, block in teacher.walk(0, teacher.num_blocks - 1):
        state = architecture.run_block(block, state)
    assert torch.equal(architecture.finish(teacher.outer, state), architecture.call(model, inputs))


def test_only_floats_take_the_teachers_precision(teacher_file, padded_inputs):
    teacher = Teacher(Weights(teacher_file), torch.bfloat16, "cpu", streamed=True)
    state = teacher.embed(padded_inputs())
    assert (
        state.image.dtype == state.text.dtype == torch.bfloat16
        and state.text_mask.dtype == torch.bool
    )
    assert next(teacher.block(0).parameters()).dtype == torch.bfloat16


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return StateStore(None if request.param == "memory" else tmp_path / "states")


def test_states_come_back_by_key_and_batch(store, architecture, model, padded_inputs):
    states = [architecture.embed(model, padded_inputs(seed=seed)) for seed in (0, 1)]
    for batch, state in enumerate(states):
        store.put(3, batch, state)
        store.put("map_3", batch, state.with_streams(state.image + 1, state.text + 2))
    for batch, state in enumerate(states):
        assert torch.equal(store.get(3, batch, state).image, state.image)
        moved = store.get("map_3", batch, state)
        assert torch.equal(moved.image, state.image + 1) and torch.equal(moved.text, state.text + 2)
        assert moved.conditioning is state.conditioning and moved.text_mask is state.text_mask
    store.drop(3, 0)
    store.drop(3, 0)
    assert [store.has(3, 0), store.has(3, 1), store.has("map_3", 0)] == [False, True, True]
    store.clear()
    assert not store.has(3, 1) and not (store.folder and store.folder.exists())


def test_states_wait_in_memory_as_long_as_there_is_room(
    tmp_path, architecture, model, padded_inputs
):
    state = architecture.embed(model, padded_inputs())
    size = state.image.nbytes + state.text.nbytes
    store = StateStore(tmp_path / "states", room=2.5 * size)
    for batch in range(3):
        store.put(1, batch, state.with_streams(state.image + batch, state.text))
    assert [path.name for path in store.folder.iterdir()] == ["state_1_batch_2"]
    for batch in range(3):
        assert torch.equal(store.get(1, batch, state).image, state.image + batch)
    store.put(1, 0, state)  # in the place of what it was
    store.drop(1, 1)
    store.put(2, 0, state)
    assert len(list(store.folder.iterdir())) == 1
    store.clear()
    assert store.room == 2.5 * size


def test_states_on_disk_do_not_wait_for_it(
    tmp_path, architecture, model, padded_inputs, monkeypatch
):
    """At full size a detection writes a million of them."""
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("fsync"))
    state = architecture.embed(model, padded_inputs())
    for dtype in (torch.float32, torch.bfloat16):
        kept = replace(
            state,
            image=state.image.to(dtype),
            text=state.text.to(dtype)[:, :0],
            modulated_text=state.text,
        )
        store = StateStore(tmp_path / "states")
        store.put(1, 0, kept)
        found = store.get(1, 0, state)
        for name in ("image", "text", "modulated_text"):
            assert (
                torch.equal(getattr(found, name), getattr(kept, name))
                and found.image.dtype is dtype
            )
        store.clear()


def test_a_full_disk_names_the_file(tmp_path, architecture, model, padded_inputs):
    state, store = architecture.embed(model, padded_inputs()), StateStore(tmp_path / "states")
    (tmp_path / "states" / "state_1_batch_0").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*state_1_batch_0"):
        store.put(1, 0, state)


def test_a_sweep_leaves_one_boundary_at_a_time(teacher, store, architecture, model, padded_inputs):
    embedded = [teacher.embed(padded_inputs(seed=seed)) for seed in (0, 1)]
    states = list(embedded)
    for index, block, batches in sweep(teacher, embedded, store, 3):
        states = [architecture.run_block(block, state) for state in states]
        assert batches == [0, 1]
        for batch in batches:
            assert torch.equal(
                store.get(index + 1, batch, embedded[batch]).text, states[batch].text
            )
        assert [store.has(key, 0) for key in range(7)] == [
            key in (index, index + 1) for key in range(7)
        ]
    assert index == 3 and store.has(4, 1) and not store.has(3, 1)


def files_of(folder) -> dict[str, bytes]:
    """Contents by name; a plan without its timing."""
    contents = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    plan = json.loads(contents["plan.json"])
    for variant in plan["variants"]:
        assert variant.pop("milliseconds") > 0
    return contents | {"plan.json": json.dumps(plan).encode()}


def test_streamed_stages_write_the_same_files_bit_for_bit(
    tmp_path, teacher_file, make_run, run_stages
):
    folders = {
        streamed: make_run(tmp_path / str(streamed), teacher_file) for streamed in (False, True)
    }
    for streamed, folder in folders.items():
        run_stages(teacher_file, folder, *STAGES, streamed=streamed)
    resident, streamed = (files_of(folder) for folder in folders.values())
    assert resident.keys() == streamed.keys()
    assert [name for name in resident if resident[name] != streamed[name]] == []
    assert {"curves.safetensors", "detect.json", "probes/block_005.safetensors"} <= resident.keys()
    plan = json.loads(resident["plan.json"])
    assert len(plan["intervals"]) >= 1 and {v["name"] for v in plan["variants"]} == {
        "full",
        "large",
        "medium",
        "small",
    }
    assert sum(name.startswith("depth/") for name in resident) == len(plan["intervals"])
