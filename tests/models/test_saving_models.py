"""save_pretrained of what open_model gives: a folder that diffusers loads to the same outputs, or a
refusal in one line."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export

from ..tiny.trained_run import write_parts

REFUSED = "is pruned or folded, .* `ppcl export --layout diffusers`"


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher_file, make_run) -> dict:
    """Three files of one run: its bundle, a variant with the teacher's indices, and one that is
    renumbered for stock hosts."""
    run = Run(make_run(tmp_path_factory.mktemp("run"), teacher_file))
    write_parts(run, teacher_file)
    options = {"model": teacher_file, "run": run.folder, "store": "float32"}
    return {
        "bundle": export(ExportConfig(**options)),
        "standalone": export(
            ExportConfig(**options, layout="ppcl", variant="smallest", name="own")
        ),
        "renumbered": export(
            ExportConfig(**options, layout="comfyui", variant="3-4", name="stock")
        ),
    }


@pytest.mark.parametrize(
    "name, variant",
    [("bundle", "small"), ("bundle", "3-4"), ("bundle", "smallest"), ("standalone", None)],
)
def test_a_pruned_model_is_not_saved_as_what_it_is_not(
    tmp_path, teacher_file, files, name, variant
):
    model = open_model(files[name], variant, teacher_file if variant else None)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=REFUSED) as caught:
            one.save_pretrained(tmp_path / "folder", max_shard_size="1GB")
        assert "\n" not in str(caught.value) and str(files[name]) in str(caught.value)
    with pytest.raises(ValueError, match=REFUSED):
        model.save_pretrained(save_directory=tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folded_model_is_refused_too(tmp_path, folded_file):
    with pytest.raises(ValueError, match=REFUSED):
        open_model(folded_file).save_pretrained(tmp_path / "folder")


@pytest.fixture
def folded_file(tmp_path, teacher_file):
    from ppcl_engine.settings.convert_settings import FoldConfig
    from ppcl_engine.stages.convert.fold import fold

    return fold(
        FoldConfig(
            path=teacher_file, run=tmp_path / "fold", steps="2", device="cpu", dtype="float32"
        )
    )


@pytest.mark.parametrize("name", ["teacher", "full", "renumbered"])
def test_a_whole_model_is_saved_and_loads_in_diffusers(
    tmp_path, teacher_file, files, architecture, padded_inputs, name
):
    opened = {
        "teacher": lambda: open_model(teacher_file),
        "full": lambda: open_model(files["bundle"], "full", teacher_file),
        "renumbered": lambda: open_model(files["renumbered"]),
    }
    model = opened[name]()
    model.save_pretrained(tmp_path / "folder")
    kind = getattr(diffusers, architecture.diffusers_class)
    loaded = kind.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        outputs = [architecture.call(one, padded_inputs(samples=2)) for one in (model, loaded)]
    assert torch.equal(*outputs)
