"""A folded model's blocks are diffusers' own on small maps: a table gives the very bits, a basis
what its coefficients reach, at every batch, in edit models, under autocast, with projections."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ppcl_engine.architectures.folded import (
    Folding,
    TableMap,
    first_half,
    folding_of,
    unfolded_config,
)
from ppcl_engine.models.cost import CostModel
from ppcl_engine.models.folding.basis import directions, project
from ppcl_engine.models.folding.tables import batches_of, conditionings, make_table, rows_of

TIMESTEPS = (1.0, 0.75, 0.25)


def basis_of(architecture, model, rank: int) -> torch.Tensor:
    t = torch.linspace(0, 1, 257)
    return directions(
        F.silu(architecture.time_conditioning(model.time_text_embed, t, torch.float32)), rank
    ).float()


def folded(architecture, config: dict, model, form: str, samples=(1, 3), rank: int = 31):
    """diffusers' model with its modulations folded, on the other tensors of `model`."""
    names = [
        f"transformer_blocks.{i}.{n}"
        for i in range(config["num_layers"])
        for n in architecture.timestep_modulations
    ]
    state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in names}
    modulations = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    if form == "basis":
        basis = basis_of(architecture, model, rank)
        folding = Folding(form="basis", inputs=1 + rank)
        state["time_text_embed.folding.directions"] = basis
        for name, modulation in modulations.items():
            state |= {
                f"{name}.weight": project(modulation[1].weight, basis),
                f"{name}.bias": modulation[1].bias,
            }
    else:
        timesteps = (*TIMESTEPS, *architecture.reference_timesteps(config))
        rows = rows_of(architecture, config, samples)
        given = conditionings(
            lambda t: architecture.time_conditioning(model.time_text_embed, t, torch.float32),
            timesteps,
            batches_of(architecture, config, rows),
        )
        table = make_table(
            ((name, lambda m=m: m, given) for name, m in modulations.items()), timesteps
        )
        folding = Folding(form="table", inputs=len(timesteps), batches=table.batches)
        state["time_text_embed.folding.timesteps"] = torch.tensor(timesteps)
        state |= {f"{name}.weight": values for name, values in table.columns.items()}
    config = {**config, "folding": folding.to_config()}
    outer = architecture.build_outer(config)
    built = architecture.assemble(
        outer, config, [architecture.build_block(config, i) for i in range(6)]
    )
    built.load_state_dict(state)
    return built.eval().requires_grad_(False)


def inputs_at(padded_inputs, samples: int, t: float) -> dict:
    return {**padded_inputs(samples=samples), "timestep": torch.full((samples,), t)}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("t", TIMESTEPS)
def test_a_table_gives_the_same_bits(architecture, model, padded_inputs, samples, t):
    found = folded(architecture, architecture.tiny_config, model, "table")
    inputs = inputs_at(padded_inputs, samples, t)
    assert torch.equal(architecture.call(found, inputs), architecture.call(model, inputs))


def test_samples_of_different_timesteps_in_one_batch(architecture, model, padded_inputs):
    found = folded(architecture, architecture.tiny_config, model, "table")
    inputs = {**padded_inputs(samples=3), "timestep": torch.tensor([0.25, 1.0, 0.75])}
    assert torch.equal(architecture.call(found, inputs), architecture.call(model, inputs))


def test_another_number_of_samples_differs_by_rounding_alone(architecture, model, padded_inputs):
    found = folded(architecture, architecture.tiny_config, model, "table", samples=(1,))
    inputs = inputs_at(padded_inputs, 5, 0.75)
    torch.testing.assert_close(
        architecture.call(found, inputs), architecture.call(model, inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("form", ["table", "basis"])
def test_an_edit_model_reads_the_column_of_t_0(architecture, make_model, padded_inputs, form):
    model, config = make_model(zero_cond_t=True), {**architecture.tiny_config, "zero_cond_t": True}
    found = folded(architecture, config, model, form)
    inputs = padded_inputs(samples=3, references=((1, 2, 3),))
    inputs["timestep"] = torch.tensor([0.25, 1.0, 0.75])
    ours, theirs = architecture.call(found, inputs), architecture.call(model, inputs)
    assert (
        torch.equal(ours, theirs)
        if form == "table"
        else torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    )
    plain = folded(architecture, architecture.tiny_config, make_model(), form)
    assert not torch.allclose(architecture.call(plain, inputs), theirs, atol=1e-2)


def test_a_whole_basis_loses_nothing_and_less_loses_more(architecture, model, padded_inputs):
    inputs = padded_inputs(samples=3)
    exact, errors = architecture.call(model, inputs), []
    for rank in (2, 8, 31):
        found = architecture.call(
            folded(architecture, architecture.tiny_config, model, "basis", rank=rank), inputs
        )
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_block_by_block_equals_the_whole_forward(architecture, model, padded_inputs):
    found = folded(architecture, architecture.tiny_config, model, "basis", rank=8)
    inputs = padded_inputs(samples=3)
    state = architecture.embed(found, inputs)
    for block in found.transformer_blocks:
        state = architecture.run_block(block, state)
    assert torch.equal(architecture.finish(found, state), architecture.call(found, inputs))


def test_in_bfloat16_the_basis_rounds_no_more_than_the_model(architecture, model, padded_inputs):
    """Coefficients are carried in two parts, so that bf16 does not round them."""
    inputs = padded_inputs(samples=3)
    exact = architecture.call(model, inputs)
    half = {
        k: v.bfloat16() if k in ("hidden_states", "encoder_hidden_states") else v
        for k, v in inputs.items()
    }
    found = copy.deepcopy(folded(architecture, architecture.tiny_config, model, "basis")).bfloat16()
    errors = [
        float((architecture.call(m, half).float() - exact).norm())
        for m in (found, copy.deepcopy(model).bfloat16())
    ]
    assert errors[0] < 1.25 * errors[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = architecture.call(
            folded(architecture, architecture.tiny_config, model, "basis"), inputs
        ).float()
    assert float((mixed - exact).norm()) < 1.25 * errors[1]


@pytest.mark.parametrize("form", ["table", "basis"])
@pytest.mark.parametrize("kind", ["ffn_image", "ffn_text"])
def test_a_cut_modulation_is_the_first_half(architecture, model, padded_inputs, form, kind):
    found = folded(architecture, architecture.tiny_config, model, form)
    inputs = inputs_at(padded_inputs, 3, 0.25)
    blocks = [copy.deepcopy(m.transformer_blocks[2]) for m in (model, found)]
    for block in blocks:
        architecture.project_ffn(block, kind, "paper")
    states = [
        architecture.run_block(b, architecture.embed(m, inputs))
        for b, m in zip(blocks, (model, found), strict=True)
    ]
    for stream in ("image", "text"):
        torch.testing.assert_close(
            *(state.stream(stream) for state in states), rtol=1e-5, atol=1e-5
        )


def test_half_of_a_map_has_tensors_of_its_own():
    linear = TableMap(3, 8, (1, 2))
    half = first_half(linear)
    assert (
        type(half) is TableMap
        and half.batches == (1, 2)
        and half.out_features == 4
        and half.bias is None
    )
    assert (
        torch.equal(half.weight, linear.weight[:4])
        and half.weight.data_ptr() != linear.weight.data_ptr()
    )


def test_an_unknown_timestep_is_one_clear_line(architecture, model, padded_inputs):
    found = folded(architecture, architecture.tiny_config, model, "table")
    with pytest.raises(
        ValueError,
        match="no timestep 0.3, and no base file is given; it has 1, 0.75, 0.25 in float32: ",
    ):
        architecture.call(found, inputs_at(padded_inputs, 1, 0.3))


@pytest.mark.parametrize("form", ["table", "basis"])
def test_costs_are_counted_without_weights(architecture, form):
    config = {**architecture.tiny_config, "folding": Folding(form=form, inputs=4).to_config()}
    full, folded_block = (
        CostModel(architecture, c, (1, 2, 2), 3).block(0)
        for c in (architecture.tiny_config, config)
    )
    width = architecture.width(config)
    biases = 12 * width if form == "basis" else 0
    assert (
        full.parameters - folded_block.parameters
        == 12 * width * (width + 1) - 12 * width * 4 - biases
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"form": "cosine", "inputs": 3},
            "folding 'cosine' with 3 inputs is unknown; known forms: table, basis",
        ),
        ({"form": "table", "inputs": 10**9}, "folding 'table' with 1000000000 inputs"),
        (
            {"form": "table", "inputs": 3, "batches": []},
            "the folding's batches .* are not whole numbers from 1",
        ),
        (
            {"form": "table", "inputs": 3, "precision": "int4"},
            "the folding's precision 'int4' is unknown; known: float32",
        ),
        ({"form": "table", "inputs": 3, "more": 1}, "is not readable; fold the model again"),
        (7, "is not readable; fold the model again"),
    ],
)
def test_a_configuration_from_anywhere(values, message):
    with pytest.raises(ValueError, match=message):
        folding_of({"folding": values})


def test_there_and_back():
    folding = Folding(form="table", inputs=3, batches=(1, 2), mark="m")
    assert folding_of({"folding": folding.to_config()}) == folding and folding.columns == 6
    assert folding_of({}) is None and unfolded_config({"a": 1, "folding": {}}) == {"a": 1}
