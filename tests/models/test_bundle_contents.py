"""What a bundle and a standalone hold is what their plan says, and a base is the very teacher; else
it is said which tensor."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.bundle import PLAN_KEY, write_bundle
from ppcl_engine.models.bundle_contents import projection_prefix, student_prefix
from ppcl_engine.models.standalone import write_standalone
from ppcl_engine.models.surgery import build_student
from ppcl_engine.models.teacher_hashes import TEACHER_KEY, teacher_hashes
from ppcl_engine.models.tensor_sources import Source
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, Variant, WidthSite
from ppcl_engine.settings.assess_settings import InspectConfig
from ppcl_engine.stages.assess.inspect import inspect
from ppcl_engine.system.float8 import scaled_fp8
from ppcl_engine.system.tensor_files import TensorEntry, TensorFile, write_tensors

BITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, architecture, teacher_file):
    weights = Weights(teacher_file)
    plan = PruningPlan(
        architecture=architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=2, correction="4"),),
        sites=(WidthSite(block=4, kind="ffn_image", form="gated"),),
        variants=(Variant(name="small", intervals=("1-2",), sites=("ffn_image:4",), parameters=1),),
    )
    student = build_student(architecture, weights.config, plan.intervals[0]).state_dict()
    tensors = {student_prefix(plan.intervals[0]) + name: tensor for name, tensor in student.items()}
    width = architecture.width(weights.config)
    tensors |= {
        f"{projection_prefix('4', 'ffn_image')}map.{n}": torch.rand(s)
        for n, s in (("weight", (width, width)), ("bias", (width,)))
    }
    entries = [TensorEntry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    path = tmp_path_factory.mktemp("bundle") / "a.ppcl.safetensors"
    write_bundle(path, plan, entries, teacher_hashes(weights))
    return path, plan


@pytest.fixture(scope="module")
def standalone(tmp_path_factory, bundle, teacher_file):
    path, plan = bundle
    state = open_model(path, "small", teacher_file).state_dict()
    sources = {name: Source(tuple(t.shape), lambda t=t: t) for name, t in state.items()}
    return write_standalone(
        tmp_path_factory.mktemp("alone") / "pruned.safetensors",
        sources,
        plan,
        plan.variant("small"),
        "float32",
    )


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("transformer_blocks.")


def base_of(path, model, model_config, change):
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors |= change(name, tensor) if is_matrix(name, tensor) else {name: tensor}
    write_tensors(path, tensors, {"config": json.dumps(model_config(model))})
    return path


def test_a_base_with_altered_matrices_is_told_by_what_differs(
    tmp_path, bundle, model, model_config
):
    base = base_of(
        tmp_path / "base.safetensors",
        model,
        model_config,
        lambda n, t: {n: t * 1.01 if ".to_q." in n else t},
    )
    assert Weights(base).fingerprint == bundle[1].fingerprint  # which is of vectors
    with pytest.raises(
        ValueError,
        match=r"base.safetensors is not the teacher of .*: 6 of \d+ tensors differ \(transformer_blocks.0.attn.to_q.weight, ",
    ):
        open_model(bundle[0], "small", base)
    with pytest.raises(ValueError, match="6 of .* tensors differ"):
        inspect(InspectConfig(path=bundle[0], base=base, verify=True))
    model = open_model(bundle[0], "1-2", base_of(base, model, model_config, lambda n, t: {n: t}))
    assert len(model.transformer_blocks) == 6


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp8"])
def test_a_base_in_another_precision_is_compared_as_far_as_that_goes(
    tmp_path, bundle, model, model_config, capsys, kind
):
    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if kind != "fp8":
            return {name: tensor.to(BITS.get(kind, torch.float32))}
        values, scale = scaled_fp8(tensor)
        return {name: values, name.replace(".weight", ".weight_scale"): scale}

    base = base_of(tmp_path / "base.safetensors", model, model_config, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_model(bundle[0], "small", base)
    said = [str(w.message) for w in caught if "cannot be compared" in str(w.message)]
    stored = {"fp16": "F16", "fp8": "F8_E4M3 with a scale"}.get(kind)
    matrices = sum(is_matrix(n, t) for n, t in model.state_dict().items())
    assert said == (
        []
        if stored is None
        else [
            f"{base}: {matrices} tensors are {stored}, the teacher of {bundle[0]} had F32, so they cannot be compared"
        ]
    )
    inspect(InspectConfig(path=bundle[0], base=base, verify=True))
    assert "tensors compared" in capsys.readouterr().out
    if kind == "bf16":
        altered = base_of(
            tmp_path / "b.safetensors", model, model_config, lambda n, t: {n: (t * 1.1).bfloat16()}
        )
        with pytest.raises(ValueError, match=f"{matrices} of .* tensors differ"):
            open_model(bundle[0], "small", altered)


def test_a_bundle_of_before_knows_no_teacher(
    tmp_path, bundle, model, model_config, teacher_file, capsys
):
    file = TensorFile(bundle[0])
    old = tmp_path / "old.ppcl.safetensors"
    write_tensors(old, file.read_all(), {PLAN_KEY: file.metadata[PLAN_KEY]})
    base = base_of(tmp_path / "base.safetensors", model, model_config, lambda n, t: {n: t * 2})
    open_model(old, "small", base)
    inspect(InspectConfig(path=old, base=teacher_file, verify=True))
    assert "made before hashes of its teacher were kept" in capsys.readouterr().out


def changed(path, target, change):
    file = TensorFile(path)
    tensors = file.read_all()
    change(tensors)
    write_tensors(target, tensors, file.metadata)
    return target


CHANGES = {
    "missing": (lambda t, n: t.pop(n), "lacks .*{name}"),
    "of another shape": (
        lambda t, n: t.update({n: t[n][:-1].clone()}),
        r"{name} has shape \(.*, not \(",
    ),
    "whole numbers": (
        lambda t, n: t.update({n: t[n].int()}),
        "{name} is torch.int32, not numbers of a model",
    ),
    "a stranger": (lambda t, n: t.update({"x" + n: t[n]}), "the plan has no place for x{name}"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_bundle_that_does_not_match_its_plan(tmp_path, bundle, teacher_file, kind):
    change, said = CHANGES[kind]
    name = "students.1-2.attn.to_q.weight"
    path = changed(
        bundle[0], tmp_path / "a.ppcl.safetensors", lambda tensors: change(tensors, name)
    )
    for read in (
        lambda: open_model(path, "small", teacher_file),
        lambda: inspect(InspectConfig(path=path)),
    ):
        match = (
            said.format(name=name) if "lacks" not in said else "lacks|attn.to_q.weight is missing"
        )
        with pytest.raises(ValueError, match=f"a.ppcl.safetensors.*({match})") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "of another shape", "whole numbers"])
def test_a_standalone_that_does_not_match_its_structure(tmp_path, standalone, kind):
    change, said = CHANGES[kind]
    name = "transformer_blocks.3.attn.to_out.0.weight"
    path = changed(standalone, tmp_path / "a.safetensors", lambda tensors: change(tensors, name))
    for read in (lambda: open_model(path), lambda: inspect(InspectConfig(path=path))):
        with pytest.raises(ValueError, match=f"a.safetensors.*{said.format(name=name)}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_the_teachers_hashes_are_of_values_not_of_layout(tmp_path, model, teacher_file):
    model.save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    assert json.loads(teacher_hashes(Weights(tmp_path / "folder"))) == json.loads(
        teacher_hashes(Weights(teacher_file))
    )
    assert (
        len(json.loads(teacher_hashes(Weights(teacher_file)))) == len(model.state_dict())
        and TEACHER_KEY
    )


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_attention_heads": ["x"]}, "num_attention_heads should be a valid integer"),
        ({"in_channels": None}, "in_channels should be a valid integer"),
        ({"joint_attention_dim": 4}, "joint_attention_dim is 4, but"),
    ],
)
def test_a_bundle_whose_plan_describes_another_model(
    tmp_path, bundle, teacher_file, changes, reason
):
    plan = bundle[1].with_parts(config={**bundle[1].config, **changes})
    write_bundle(tmp_path / "b.ppcl.safetensors", plan, [])
    with pytest.raises(ValueError, match=f"b.ppcl.safetensors: configuration: {reason}"):
        open_model(tmp_path / "b.ppcl.safetensors", "full", teacher_file)
