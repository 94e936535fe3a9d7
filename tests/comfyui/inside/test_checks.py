"""What comes into a node is checked by its schema, once for all of them, before anything is
done."""

import math

import numpy as np
import pytest
import torch

import nodes as host_nodes

SCALARS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
WRONG = {
    "INT": ["1", 1.5, True, None, [1], {"a": 1}, math.nan, 10**30, -(10**30), torch.zeros(1)],
    "FLOAT": [
        "1",
        True,
        None,
        [1.0],
        {"a": 1},
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        torch.zeros(1),
    ],
    "STRING": [1, True, None, ["a"], {"a": "b"}, b"a", "x" * 200_000, "a \ud800"],
    "BOOLEAN": ["true", 1, 0, None, [True], {}],
    "COMBO": [1, None, True, ["a"], {"a": "b"}, math.nan, "x" * 2000],
    "MODEL": [1, None, "a", {"model": 1}, [1], torch.zeros(1)],
    "CLIP": [1, "a", {"clip": 1}],
    "LATENT": [1, None, "a", {"a": 1}, [1], torch.zeros(1)],
    "IMAGE": [1, None, "a", {"a": 1}, torch.zeros(3)],
    "SIGMAS": [1, "a", {"a": 1}, torch.zeros(1, 2)],
    "PPCL_RUN": [1, None, True, ["a", 0], {"a": "b"}],
}


@pytest.fixture
def schemas(pack):
    """The schema of every node of this pack, by its id."""
    ours = [name for name in host_nodes.NODE_CLASS_MAPPINGS if name.startswith("PPCL_")]
    return {name: host_nodes.NODE_CLASS_MAPPINGS[name].define_schema() for name in ours}


def test_no_node_goes_around_the_check(pack, schemas):
    """A node says what it does in `perform`; numbers have bounds, links a type that is known."""
    for node, schema in schemas.items():
        assert "execute" not in vars(host_nodes.NODE_CLASS_MAPPINGS[node])
        for row in schema.inputs:
            assert row.io_type in SCALARS or row.io_type in pack("checks").LINKS, (node, row.id)
            assert row.io_type not in ("INT", "FLOAT") or row.min < row.max, (node, row.id)


def test_wrong_types_of_every_input(run_node, schemas):
    for node, row, value in (
        (n, r, v) for n, s in schemas.items() for r in s.inputs for v in WRONG[r.io_type]
    ):
        if value is None and row.optional:
            continue
        with pytest.raises(ValueError) as error:
            run_node(node, **{row.id: value})
        said = str(error.value)
        assert (
            said.startswith(f"{schemas[node].display_name}: {row.id} ")
            and "\n" not in said
            and len(said) < 400
        ), said


def test_numbers_beyond_their_bounds(run_node, schemas):
    for node, row in (
        (n, r) for n, s in schemas.items() for r in s.inputs if r.io_type in ("INT", "FLOAT")
    ):
        for value in (row.min - 1, row.max + 1):
            with pytest.raises(ValueError, match=f"{row.id} is .*; give a (whole )?number from "):
                run_node(node, **{row.id: value})


def test_what_fits(pack, schemas):
    """Also numbers of other libraries, which links of other nodes bring, and what may be left
    out."""
    problem, rows = (
        pack("checks").problem_of,
        {row.id: row for row in schemas["PPCL_FineTune"].inputs},
    )
    given = {
        "steps": [1, np.int64(7)],
        "learning_rate": [0, 1e-5, np.float32(1e-5)],
        "ema": [0.5, 1 / 3],
    }
    assert not any(problem(rows[name], value) for name, values in given.items() for value in values)
    pack("checks").check_inputs(schemas["PPCL_Probe"], {"run": "probe-00000000", "after": None})


@pytest.mark.parametrize(
    "value, said",
    [
        ("x" * 500, "'" + "x" * 59 + "..."),
        ("a\nb", "'a\\nb'"),
        (torch.zeros(2, 2), "a Tensor"),
        (object(), "a object"),
    ],
)
def test_a_wrong_value_in_words(pack, value, said):
    assert pack("checks").shown(value) == said


def test_choices_in_words(pack, schemas):
    row = next(row for row in schemas["PPCL_Detect"].inputs if row.id == "method")
    said = pack("checks").problem_of(row, "magic")
    assert said == f"'magic' is not a choice; choose from {', '.join(row.options)}"
    choice = pack("checks")._choice([f"file {number}" for number in range(5000)], "x", False)
    assert choice.endswith("file 11, ... (5,000 in all)")
