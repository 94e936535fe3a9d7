"""Folded files of the engine and the host's own tables; what does not belong together is one
line."""

import json

import comfy.samplers
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ....tiny.released_models import (
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    released_state,
    write_folder,
)
from ..conftest import BOUND
from ..forwards import relative_error

pytestmark = pytest.mark.usefixtures("loose_bound")


@pytest.fixture(scope="module")
def folded_file(teacher, tmp_path_factory, models):
    """Written by the engine for ComfyUI, beside the models."""

    def make(form: str, **settings):
        folder = tmp_path_factory.mktemp("folded")
        given = {
            "dtype": "float32",
            "host": "comfyui",
            "bound": BOUND,
            "name": f"folded_{form}",
            "device": "cpu",
        }
        path = fold(FoldConfig(path=teacher, form=form, run=folder, **{**given, **settings}))
        return path.replace(models.diffusion_models / path.name)

    return make


def test_a_folded_file_in_both_loaders(folded_file, load, run_node, drawn, teacher):
    expected = drawn(load(teacher.name))
    table, basis = folded_file("table", timesteps="1 0.6667 0.3333"), folded_file("basis")
    with pytest.raises(ValueError, match="no timestep .*no base file is given"):
        drawn(load(table.name))
    assert torch.equal(drawn(load(table.name, base=teacher.name)), expected)
    assert relative_error(drawn(load(basis.name)), expected) < BOUND
    (stock,) = run_node("UNETLoader", unet_name=basis.name, weight_dtype="default")
    assert torch.equal(drawn(stock), drawn(load(basis.name)))


def test_the_engines_own_table_has_the_hosts_bits(folded_file, load, drawn, teacher, whole):
    sampling = whole.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 3)
    path = folded_file(
        "table", timesteps=" ".join(f"{t:.9g}" for t in sigmas[:-1].tolist()), name="same"
    )
    assert torch.equal(drawn(load(path.name)), drawn(load(teacher.name)))


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"fold": "cosine"}, "fold 'cosine' is not a choice; choose from off, table, basis"),
        (
            {"file": "folded_basis.safetensors", "base": "none", "fold": "table"},
            r"is folded already \(basis\); set fold to off",
        ),
        (
            {"file": "folded_table.safetensors", "base": "other.safetensors"},
            "folded_table.safetensors was not folded from",
        ),
        (
            {"file": "folded_basis.safetensors", "base": "teacher.safetensors"},
            "is not a bundle, so it takes no base model",
        ),
        (
            {"base": "folded_basis.safetensors"},
            "is not folded, but folded_basis.safetensors is; choose a bundle and a base",
        ),
    ],
)
def test_bad_input_is_one_line(
    load, bundle, teacher, folded_file, make_model, save_model, models, widgets, message
):
    for form in ("table", "basis"):
        folded_file(form)
    save_model(
        models.diffusion_models / "other.safetensors",
        make_model(1, in_channels=64, out_channels=16),
    )
    given = {"file": bundle.name, "base": teacher.name, **widgets}
    with pytest.raises(ValueError, match=message) as error:
        load(**given)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tables(models):
    """The folder of tables, empty."""
    return models.ppcl / "tables"


def test_a_bound_that_no_rank_keeps_is_one_line(load, bundle, teacher, pack, monkeypatch):
    monkeypatch.setattr(pack("loading.fold_on_load"), "BOUND", 1e-4)
    with pytest.raises(
        ValueError, match=r"no useful rank keeps the error within 0.0001: .* form table"
    ) as error:
        load(bundle.name, base=teacher.name, fold="basis")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["flux1", "sd35"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_models_whose_modulations_read_more(load, models, name, form):
    architecture = architecture_named(name)
    shapes = expected_shapes(architecture, architecture.tiny_config)
    file = models.diffusion_models / f"{name}.safetensors"
    about = {"config": json.dumps(architecture.tiny_config)}
    write_tensors(file, {key: torch.zeros(shape) for key, shape in shapes.items()}, about)
    with pytest.raises(
        ValueError, match="read the timestep and pooled text|is known here"
    ) as error:
        load(file.name, fold=form)
    assert "\n" not in str(error.value)


def test_an_edit_models_file(load, drawn, teacher, models):
    """With the host's mark in it, an empty tensor: references are modulated as at t = 0, so that
    the table has it."""
    file = models.diffusion_models / "edit.safetensors"
    mark = {next(iter(architecture_named("qwen_image").marks)): torch.empty(0)}
    write_tensors(file, TensorFile(teacher).read_all() | mark, TensorFile(teacher).metadata)
    table, expected = load(file.name, fold="table"), drawn(load(file.name))
    assert torch.equal(expected, drawn(load(teacher.name))) and torch.equal(drawn(table), expected)
    assert 0.0 in table.model.diffusion_model.time_text_embed.folding.timesteps.tolist()


def test_a_table_file_of_another_model_is_refused(load, bundle, teacher, drawn, tables):
    model = load(bundle.name, base=teacher.name, fold="table")
    drawn(model, steps=7)
    for path in tables.glob("*.safetensors"):
        file = TensorFile(path)
        if "ppcl_table" in file.metadata:
            about = json.loads(file.metadata["ppcl_table"])
            write_tensors(path, file.read_all(), {"ppcl_table": json.dumps({**about, "key": "x"})})
    again = load(bundle.name, base=teacher.name, fold="table")
    drawn(again, steps=7)  # made again beside it


def test_tables_are_no_models(models, pack, tables):
    assert list(tables.glob("*.safetensors"))
    assert not any(name.startswith("tables") for name in pack("paths").model_files())


def test_released_models(load, drawn, models, make_model, model_config):
    """Width-pruned models as the method's authors release them, with old and new text projections;
    they come without a plan and a base."""
    sizes = {
        "in_channels": 64,
        "out_channels": 16,
        "attention_head_dim": 32,
        "axes_dims_rope": [4, 14, 14],
    }
    state = released_state(make_model(num_layers=TEACHER_BLOCKS, **sizes), KEPT, LISTS)
    config = model_config(make_model(num_layers=len(KEPT), **sizes))
    write_folder(models.ppcl / "to_fold", state, config, LISTS, "sharded")
    write_tensors(models.diffusion_models / "single_to_fold.safetensors", state)
    for options in ({}, {"legacy_text": True}, {"preset": "by intervals", "intervals": INTERVALS}):
        for name in ("to_fold/", "single_to_fold.safetensors"):
            expected = drawn(load(name, **options))
            assert torch.equal(drawn(load(name, fold="table", **options)), expected)
            assert 0 < relative_error(drawn(load(name, fold="basis", **options)), expected) < BOUND
