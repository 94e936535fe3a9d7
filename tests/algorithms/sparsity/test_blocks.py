"""Statistics of real blocks against a plain forward, and channels in another order, in every
architecture."""

import copy

import pytest
import torch

from ppcl_engine.algorithms.sparsity.blocks import _permute, prune_block, watch
from ppcl_engine.algorithms.sparsity.grams import timestep_weights
from ppcl_engine.algorithms.sparsity.patterns import pattern_named
from ppcl_engine.algorithms.sparsity.pruning import Method
from ppcl_engine.architectures import ARCHITECTURES
from ppcl_engine.architectures.linear_maps import known_columns, known_rows, linear_maps
from ppcl_engine.models.weights import Weights

pytestmark = pytest.mark.parametrize(
    "architecture", [a.name for a in ARCHITECTURES], indirect=True, scope="module"
)
JOINT_MAPS = {
    "z_image": ("attention.", "feed_forward."),
    "qwen_image_21": ("attn.", "img_mlp."),
    "krea2": ("attn.", "ff."),
}
"""prefixes of the maps that read text and image in one sequence"""
METHOD = Method(pattern=pattern_named("2:4"), sparsity=0.5, score="wanda")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, architecture, make_model, save_model):
    return Weights(
        save_model(tmp_path_factory.mktemp("blocks") / "model.safetensors", make_model())
    )


@pytest.fixture(scope="module")
def at_block(teacher, padded_inputs):
    """(block, its inputs of two batches), with the batches' timesteps"""

    @torch.no_grad()
    def make(index: int):
        outer = teacher.outer(torch.float32, "cpu")
        batches = [padded_inputs(seed=seed) for seed in (0, 1)]
        states = [teacher.architecture.embed(outer, batch) for batch in batches]
        for before in range(index):
            block = teacher.block(before, torch.float32, "cpu")
            states = [teacher.architecture.run_block(block, state) for state in states]
        return (
            teacher.block(index, torch.float32, "cpu"),
            states,
            [batch["timestep"] for batch in batches],
        )

    return make


def grams_of(teacher, block, states, times, scheme="even"):
    grams = watch(teacher.architecture.name, block, ())
    with torch.no_grad():
        for state, t in zip(states, times, strict=True):
            with grams.watching(state, timestep_weights(t, scheme)):
                teacher.architecture.run_block(block, state)
    return grams


@pytest.mark.parametrize("scheme", ["even", "early"])
def test_grams_are_those_of_a_plain_forward(teacher, at_block, scheme):
    for index in (0, teacher.num_blocks - 1):
        block, states, times = at_block(index)
        grams = grams_of(teacher, block, states, times, scheme)
        seen = {name: [] for name in linear_maps(block)}
        for name, module in linear_maps(block).items():
            module.register_forward_pre_hook(
                lambda _, arguments, inputs=seen[name]: inputs.append(arguments[0])
            )
        with torch.no_grad():
            for state in states:
                teacher.architecture.run_block(block, state)
        for name, inputs in seen.items():
            total, rows = 0, 0
            for x, state, t in zip(inputs, states, times, strict=True):
                weights = timestep_weights(t, scheme)
                real = torch.ones(x.shape[:-1], dtype=torch.bool)
                if state.text_mask is not None and ("add_" in name or "txt_mlp" in name):
                    real = state.text_mask
                elif name.startswith(JOINT_MAPS.get(teacher.architecture.name, ())):
                    real = state.real("joint")
                weights = (weights if x.ndim == 2 else weights[:, None].expand(x.shape[:2]))[real]
                total = total + torch.einsum(
                    "n,ni,nj->ij", weights, x[real].double(), x[real].double()
                )
                rows += float(weights.sum())
            torch.testing.assert_close(grams.of(name, name), total / rows, rtol=1e-4, atol=1e-5)


def test_maps_of_one_input_share_its_gram(teacher, at_block):
    grams = grams_of(teacher, *at_block(0))
    (query,) = (name for name in grams.layers if name in ("attn.to_q", "attention.to_q"))
    assert {grams.leaders[f"{query[:-1]}{letter}"] for letter in "kv"} == {query}
    assert len(grams.sums) < len(grams.layers)


def test_channels_in_another_order_change_no_output(teacher, at_block):
    for index in (0, teacher.num_blocks - 1):
        block, states, times = at_block(index)
        grams, before = grams_of(teacher, block, states, times), copy.deepcopy(block)
        matrices = {name: grams.of(name, name) for name in grams.layers}
        changed = _permute(teacher.architecture.name, block, matrices, METHOD)
        ends = ("net.2", "w2", "proj_out", "img_mlp.out", "ff.down")
        assert any(name.endswith(ends) for name in changed)
        # of krea2 several heads read the same values
        passes = any("to_out" in name or name == "proj_out" for name in changed)
        assert passes is (teacher.architecture.name != "krea2")
        run = teacher.architecture.run_block
        for state in states:
            with torch.no_grad():
                ours, theirs = run(block, state), run(before, state)
            for stream in ("image", "text"):
                torch.testing.assert_close(
                    ours.stream(stream), theirs.stream(stream), rtol=1e-4, atol=1e-4
                )
        again = grams_of(teacher, block, states, times)
        for name in changed:
            assert not torch.equal(
                block.get_submodule(name).weight, before.get_submodule(name).weight
            )
            torch.testing.assert_close(matrices[name], again.of(name, name), rtol=1e-3, atol=1e-3)


def test_another_order_loses_less(teacher, at_block):
    errors = []
    for permute in (False, True):
        block, states, times = at_block(1)
        grams = grams_of(teacher, block, states, times)
        reports = prune_block(teacher.architecture.name, block, grams, METHOD, permute, "block 1")
        errors.append({row.layer: row.error for row in reports})
        assert any(row.permuted for row in reports) == permute
    changed = [name for name in errors[0] if errors[0][name] != errors[1][name]]
    assert sum(errors[1][name] for name in changed) < sum(errors[0][name] for name in changed)


def test_known_groups_add_up(teacher):
    for index in (0, teacher.num_blocks - 1):
        block = teacher.block(index, torch.float32, "cpu")
        known = {
            n: (
                known_rows(teacher.architecture.name, block, n),
                known_columns(teacher.architecture.name, block, n),
            )
            for n in linear_maps(block)
        }
        for name, (rows, columns) in known.items():
            module = block.get_submodule(name)
            assert sum(rows) in (0, module.out_features) and sum(columns) in (0, module.in_features)
        assert any(len(rows) > 1 for rows, _ in known.values()) and any(
            columns for _, columns in known.values()
        )
