"""A bundle there and back, and the variants that it gives with its base."""

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.bundle import Bundle, is_bundle, write_bundle
from ppcl_engine.models.surgery import PassThrough, build_student
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, Variant
from ppcl_engine.system.tensor_files import TensorEntry, write_tensors

from ..tiny.tensors import same


def kept_blocks(model: torch.nn.Module) -> list[int]:
    return [
        index
        for index, block in enumerate(model.transformer_blocks)
        if not isinstance(block, PassThrough)
    ]


def student_entries(states: dict[str, dict[str, torch.Tensor]]) -> list[TensorEntry]:
    return [
        TensorEntry(f"students.{name}.{key}", tensor.dtype, tuple(tensor.shape), lambda t=tensor: t)
        for name, state in states.items()
        for key, tensor in state.items()
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, architecture, teacher_file):
    """Random students for 1-2 (plain), 3-4 (affine): path, plan, students by name."""
    weights = Weights(teacher_file)
    plan = PruningPlan(
        architecture=architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=2), Interval(first=3, last=5, correction="4")),
        variants=(Variant(name="small", intervals=("1-2", "3-5"), parameters=1),),
    )
    torch.manual_seed(5)
    students = {
        i.name: build_student(architecture, weights.config, i).requires_grad_(False)
        for i in plan.intervals
    }
    path = tmp_path_factory.mktemp("bundle") / "a.ppcl.safetensors"
    write_bundle(
        path,
        plan,
        student_entries({name: student.state_dict() for name, student in students.items()}),
    )
    return path, plan, students


def test_a_bundle_there_and_back(bundle, teacher_file):
    path, plan, students = bundle
    read = Bundle(path)
    assert read.plan == plan and is_bundle(path) and not is_bundle(teacher_file)
    for interval in plan.intervals:
        assert same(
            read.student(interval, torch.float32, "cpu").state_dict(),
            students[interval.name].state_dict(),
        )
    assert (
        sum(t.numel() for s in students.values() for t in s.parameters()) * 4 < path.stat().st_size
    )


def test_full_is_the_teacher_bit_for_bit(architecture, bundle, teacher_file, model, padded_inputs):
    inputs = padded_inputs()
    opened = open_model(bundle[0], "full", teacher_file)
    assert same(opened.state_dict(), model.state_dict())
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))


@pytest.mark.parametrize(
    "variant, kept",
    [("1-2", [0, 1, 3, 4, 5]), ("3-5", [0, 1, 2, 3]), (None, [0, 1, 3]), ("small", [0, 1, 3])],
)
def test_a_variant_runs_students_in_place_of_its_intervals(
    architecture, bundle, teacher_file, model, padded_inputs, variant, kept
):
    path, plan, students = bundle
    opened, inputs = open_model(path, variant, teacher_file), padded_inputs()
    assert kept_blocks(opened) == kept and opened.config.num_layers == 6
    chosen = plan.variant(variant).intervals
    state = architecture.embed(model, inputs)
    for index in kept:
        name = next((n for n in chosen if n.startswith(f"{index}-")), None)
        state = architecture.run_block(
            students[name] if name else model.transformer_blocks[index], state
        )
    ours = architecture.call(opened, inputs)
    assert torch.equal(ours, architecture.finish(model, state))
    assert not torch.allclose(ours, architecture.call(model, inputs), atol=1e-2)


def test_an_interval_given_back_is_the_teacher_there(bundle, teacher_file, model):
    opened = open_model(bundle[0], "3-5", teacher_file)
    for index in (0, 1, 2):
        assert same(
            opened.transformer_blocks[index].state_dict(),
            model.transformer_blocks[index].state_dict(),
        )


def test_students_that_copy_the_teacher_where_the_rest_is_identity(
    tmp_path, architecture, make_model, save_model, padded_inputs
):
    """Blocks whose gates are zero do nothing, so a copy of the block before them replaces the whole
    interval."""
    model = make_model(seed=2)
    for index in (2, 3):
        for linear in (
            model.transformer_blocks[index].img_mod[1],
            model.transformer_blocks[index].txt_mod[1],
        ):
            linear.weight.zero_(), linear.bias.zero_()
    base = save_model(tmp_path / "base.safetensors", model)
    weights = Weights(base)
    plan = PruningPlan(
        architecture=architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=3),),
    )
    write_bundle(
        tmp_path / "a", plan, student_entries({"1-3": model.transformer_blocks[1].state_dict()})
    )
    opened, inputs = open_model(tmp_path / "a", base=base), padded_inputs()
    assert kept_blocks(opened) == [0, 1, 4, 5]
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))


def test_a_bundle_wants_its_own_base(tmp_path, bundle, teacher_file, make_model, save_model):
    path = bundle[0]
    with pytest.raises(ValueError, match="is a bundle: students only; give the base model"):
        open_model(path)
    other = save_model(tmp_path / "other.safetensors", make_model(seed=1))
    with pytest.raises(ValueError, match="other.safetensors .*is not the teacher of this plan"):
        open_model(path, base=other)
    with pytest.raises(ValueError, match="is not a bundle, so it has no variant 'small'"):
        open_model(teacher_file, "small")
    for variant in (None, "small"):
        with pytest.raises(
            ValueError, match="no.ppcl.safetensors does not exist; give a model file or folder$"
        ):
            open_model(tmp_path / "no.ppcl.safetensors", variant, teacher_file)
    with pytest.raises(ValueError, match="'huge' is not in the plan; it has: small, full"):
        open_model(path, "huge", teacher_file)
    with pytest.raises(ValueError, match="holds no pruning plan"):
        Bundle(teacher_file)


def test_a_bundle_that_lacks_a_tensor_says_so(tmp_path, bundle):
    path, plan, _ = bundle
    file = Bundle(path).file
    tensors = {n: t for n, t in file.read_all().items() if n != "students.1-2.attn.to_q.bias"}
    write_tensors(tmp_path / "a", tensors, file.metadata)
    with pytest.raises(ValueError, match="student 1-2: tensor attn.to_q.bias is missing"):
        Bundle(tmp_path / "a").student(plan.intervals[0], torch.float32, "cpu")


def test_blocks_of_an_opened_model_are_streamed_where_that_is_asked_for(
    bundle, teacher_file, architecture, padded_inputs, monkeypatch
):
    read, block = [], Weights.block
    monkeypatch.setattr(
        Weights,
        "block",
        lambda self, index, *given: read.append(index) or block(self, index, *given),
    )
    inputs = padded_inputs()
    for given, blocks in (
        ((teacher_file,), 6),
        ((bundle[0], "3-5", teacher_file), 3),
        ((bundle[0], "full", teacher_file), 6),
    ):
        expected = architecture.call(open_model(*given), inputs)
        read.clear()
        model = open_model(*given, streamed=True)
        assert not read
        assert torch.equal(architecture.call(model, inputs), expected) and len(read) == blocks
        assert torch.equal(architecture.call(model, inputs), expected) and len(read) == 2 * blocks
