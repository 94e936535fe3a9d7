"""PPCL_FoldModel writes what the loader then reads, with the same bits or within the bound; bad
input is one line."""

import json

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..conftest import BOUND
from ..forwards import relative_error

pytestmark = pytest.mark.usefixtures("loose_bound")
DEFAULTS = {
    "base": "none",
    "form": "table",
    "name": "written",
    "bound": BOUND,
    "precision": "float32",
    "samples": "1 2",
}


@pytest.fixture
def fold_model(run_node, models):
    """The node with its widgets' defaults; what it writes goes when the test ends."""
    before = set(models.ppcl.iterdir())
    yield lambda file, **widgets: run_node("PPCL_FoldModel", file=file, **{**DEFAULTS, **widgets})[
        0
    ]
    for path in set(models.ppcl.iterdir()) - before:
        path.unlink()


@pytest.fixture
def sigmas(run_node, load, teacher):
    model = load(teacher.name)
    return lambda steps: run_node(
        "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
    )[0]


def test_a_full_model(fold_model, load, drawn, teacher, sigmas, models):
    text = fold_model(teacher.name, sigmas=sigmas(3))
    assert (
        text.startswith("written.safetensors in models/ppcl: ") and "table of 3 timesteps" in text
    )
    assert torch.equal(drawn(load("written.safetensors")), drawn(load(teacher.name)))
    with pytest.raises(ValueError, match="no timestep .*no base file is given"):
        drawn(load("written.safetensors"), steps=4)
    assert [path.name for path in models.ppcl.glob(".fold*")] == []


def test_a_bundle_and_its_base(fold_model, load, drawn, bundle, teacher):
    text = fold_model(bundle.name, base=teacher.name, form="basis")
    assert (
        text.startswith("written.ppcl.safetensors and written_base.safetensors in models/ppcl: ")
        and "% worst" in text
    )
    for variant in ("full", "smallest"):
        for switchable in (True, False):
            options = {"variant": variant, "switchable": switchable}
            ours = drawn(
                load("written.ppcl.safetensors", base="written_base.safetensors", **options)
            )
            assert (
                0
                < relative_error(ours, drawn(load(bundle.name, base=teacher.name, **options)))
                < BOUND
            )


def test_a_table_of_a_bundle_draws_every_variant(fold_model, load, drawn, bundle, teacher, sigmas):
    fold_model(bundle.name, base=teacher.name, sigmas=sigmas(3))
    for variant in ("full", "small", "smallest"):
        options = {"variant": variant, "switchable": False}
        ours = drawn(load("written.ppcl.safetensors", base="written_base.safetensors", **options))
        assert torch.equal(ours, drawn(load(bundle.name, base=teacher.name, **options)))


def test_a_standalone(fold_model, load, drawn, exported, models, sigmas):
    path = exported(models.diffusion_models, "ppcl", "to_fold", "smallest")
    fold_model(path.name, sigmas=sigmas(3))
    assert torch.equal(drawn(load("written.safetensors")), drawn(load(path.name)))


def test_a_renumbered_file_keeps_its_map(fold_model, load, exported, models, sigmas, drawn):
    """In a depth-pruned file for stock hosts, LoRA still finds the original's blocks."""
    path = exported(models.diffusion_models, "comfyui", "stock", "3-4")
    fold_model(path.name, sigmas=sigmas(3))
    ours, theirs = load("written.safetensors"), load(path.name)
    for model in (ours, theirs):
        blocks = model.model.diffusion_model.transformer_blocks
        assert [i for i, block in enumerate(blocks) if not list(block.parameters())] == [4]
    assert torch.equal(drawn(ours), drawn(theirs))


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"form": "cosine"}, "form 'cosine' is not a choice; choose from table, basis"),
        ({}, "a table needs the sigmas it is made for; connect the scheduler"),
        ({"form": "basis", "name": "../up"}, "letters, digits"),
        ({"form": "basis", "bound": 0.001}, "no useful rank keeps the error within 0.001"),
        (
            {"form": "basis", "base": "tiny.ppcl.safetensors"},
            "is not a bundle, so it takes no base model; set base to none",
        ),
        (
            {"file": "gone.safetensors", "form": "basis"},
            "'gone.safetensors' is neither in models/ppcl",
        ),
        (
            {"file": "tiny.ppcl.safetensors", "form": "basis"},
            "is a bundle: students only; give the full model",
        ),
    ],
)
def test_bad_input_is_one_line(fold_model, bundle, teacher, models, widgets, message):
    before = sorted(models.ppcl.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        fold_model(**{"file": teacher.name, **widgets})
    assert "\n" not in str(error.value) and sorted(models.ppcl.iterdir()) == before


def test_an_edit_model(fold_model, load, drawn, teacher, sigmas, models):
    """It modulates references as at t = 0, so the table gets that column whatever the schedule."""
    file, path = TensorFile(teacher), models.diffusion_models / "edit_to_fold.safetensors"
    config = {**json.loads(file.metadata["config"]), "zero_cond_t": True}
    mark = {next(iter(architecture_named("qwen_image").marks)): torch.empty(0)}
    write_tensors(path, file.read_all() | mark, {"config": json.dumps(config)})
    assert "table of 4 timesteps" in fold_model(path.name, sigmas=sigmas(3))
    model = load("written.safetensors")
    assert torch.equal(drawn(model), drawn(load(path.name)))
    assert model.model.diffusion_model.time_text_embed.folding.timesteps[-1] == 0


@pytest.mark.parametrize(
    ("name", "reads"), [("flux1", "guidance and pooled text"), ("sd35", "and pooled text")]
)
def test_other_architectures_say_why_not(fold_model, models, name, reads):
    architecture = architecture_named(name)
    tensors = {
        k: torch.zeros(shape)
        for k, shape in expected_shapes(architecture, architecture.tiny_config).items()
    }
    about = {"config": json.dumps(architecture.tiny_config)}
    write_tensors(models.diffusion_models / "other_kind.safetensors", tensors, about)
    with pytest.raises(
        ValueError, match=f"is {name}, whose modulations read the timestep.* {reads}: only those"
    ):
        fold_model("other_kind.safetensors", form="basis")


def test_a_name_that_is_taken(fold_model, teacher):
    fold_model(teacher.name, form="basis")
    with pytest.raises(
        ValueError, match="written.safetensors is in models/ppcl already; choose another name"
    ):
        fold_model(teacher.name, form="basis")


def test_stop_leaves_nothing(fold_model, teacher, models, pack):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    before = sorted(models.ppcl.iterdir())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fold_model(teacher.name, form="basis")
    assert sorted(models.ppcl.iterdir()) == before


def test_the_files_marks(fold_model, teacher, models):
    fold_model(teacher.name, form="basis")
    file = TensorFile(models.ppcl / "written.safetensors")
    assert "ppcl_structure" in file.keys() and "ppcl_folded_from" in file.metadata
